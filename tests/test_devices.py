"""The library on every device: on a stand-in for a GPU, and on a GPU where there is one.

With a GPU, `pytest -k cuda` runs all of them on it.
"""

import contextlib
import functools

import gymnasium
import numpy as np
import pytest
import torch
from device_cases import ALL_CASES, CASES, IMAGE, THREE, VECTOR, config_of, env_of
from elsewhere import DEVICE, elsewhere
from environments import WithSpaces
from small_policies import OwnPolicy

from ppo import PolicyConfig, PPOAgent, PPOConfig, RolloutCollector, make_policy, revalue
from ppo.learner.flat_adam import FlatAdam
from ppo.learner.torch_optimizer import TorchOptimizer
from ppo.trees import leaves

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
)
DEVICES = pytest.mark.parametrize("device", [pytest.param(DEVICE.type, id="elsewhere"), CUDA])
REAL_DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])
SMALL = {"num_envs": 3, "num_steps": 4, "num_epochs": 2, "minibatch_size": 6, "num_workers": 0}


@pytest.fixture(autouse=True)
def _all_digits(monkeypatch):
    """The products of cuDNN have as many digits as those of the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def _stand_in(request):
    """The stand-in is a device while a test of it runs."""
    callspec = getattr(request.node, "callspec", None)
    wanted = callspec is not None and callspec.params.get("device") == DEVICE.type
    with elsewhere() if wanted else contextlib.nullcontext():
        yield


def make_agent(case, device, **options):
    """An agent for a case, with the same weights on every device."""
    config = PPOConfig(policy=config_of(case), **SMALL | options)
    return PPOAgent(make_policy(*case[:2], config.policy), config=config, device=device)


def learn(agent, env, updates=2):
    """The metrics of some updates."""
    metrics = []
    steps = updates * agent.config.num_envs * agent.config.num_steps
    agent.learn(env, steps, callback=lambda report: metrics.append(report.metrics))
    return metrics


def assert_near(metrics, others):
    """Equal but for rounding, update after update."""
    assert len(metrics) == len(others) > 0
    for ours, theirs in zip(metrics, others, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"steps_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4, nan_ok=True), name


@DEVICES
@ALL_CASES
def test_training_is_what_it_is_on_the_cpu(device, case):
    agent = make_agent(case, device)
    metrics = learn(agent, env_of(case))
    assert {parameter.device.type for parameter in agent.policy.parameters()} == {device}
    assert_near(metrics, learn(make_agent(case, "cpu"), env_of(case)))


@DEVICES
@pytest.mark.parametrize(
    "options",
    [
        {"normalize_rewards": True},
        {"recompute_advantages": True, "target_kl": 1e-5, "value_clip_range": 0.2},
        {"normalize_advantages": "minibatch", "dual_clip": 3.0, "adaptive_kl": 0.01},
        {"weight_decay": 0.1, "learning_rates": {"critic": 1e-3}},
        {"optimizer": "AdamW"},
        {"optimizer": "RMSprop"},
    ],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)
def test_every_option_works(device, options):
    case = CASES["normalised"]
    agent = make_agent(case, device, **options)
    assert_near(learn(agent, env_of(case)), learn(make_agent(case, "cpu", **options), env_of(case)))
    kind = TorchOptimizer if "optimizer" in options else FlatAdam
    assert type(agent._learner._optimizer) is kind


@DEVICES
@pytest.mark.parametrize("name", ["nested", "images", "lstm", "gru"])
def test_the_first_ratio_of_a_rollout_is_1(device, name):
    case = CASES[name]
    policy = make_policy(*case[:2], config_of(case)).to(device)
    with RolloutCollector(env_of(case), num_envs=3, seed=0, device=device) as collector:
        collector.collect(policy, 5)
        rollout = collector.collect(policy, 8)
    with torch.no_grad():
        for mini in rollout.flatten().minibatches(7, torch.Generator().manual_seed(0)):
            new = policy.evaluate(mini.obs, mini.actions, **mini.context)
            assert (new.log_probs - mini.log_probs).abs().max().item() < 1e-5
    new_values = revalue(policy, rollout).values
    assert (new_values - rollout.values).abs().max().item() < 1e-5


@DEVICES
@pytest.mark.parametrize(("name", "optimizer"), [("nested", "AdamW"), ("lstm", "adam")])
def test_a_checkpoint_goes_on_there_and_on_the_cpu(device, name, optimizer, tmp_path):
    path, case = tmp_path / "agent.safetensors", CASES[name]
    agent = make_agent(case, device, normalize_rewards=True, optimizer=optimizer)
    agent.learn(env_of(case), 24, callback=lambda report: False)  # in the middle of episodes
    agent.save(path)
    twins = [PPOAgent.load(path, device=place) for place in (device, "cpu")]
    saved = {key: tensor.cpu() for key, tensor in agent.policy.state_dict().items()}
    for twin, place in zip(twins, (device, "cpu"), strict=True):
        assert {parameter.device.type for parameter in twin.policy.parameters()} == {place}
        for key, tensor in twin.policy.state_dict().items():
            assert torch.equal(tensor.cpu(), saved[key])
    metrics = [learn(one, env_of(case)) for one in (agent, *twins)]
    assert_near(metrics[1], metrics[0])
    assert_near(metrics[2], metrics[0])


@DEVICES
@ALL_CASES
def test_actions_are_those_of_the_cpu(device, case):
    agents = [make_agent(case, place) for place in (device, "cpu")]
    for agent in agents:
        agent._build(*case[:2])
    env, states = env_of(case)(), [None, None]
    obs, info = env.reset(seed=0)
    for deterministic in (True, False, True):
        answers = []
        for index, agent in enumerate(agents):
            answer = agent.act(
                obs,
                deterministic=deterministic,
                action_mask=info.get("action_mask"),
                state=states[index],
            )
            if agent.policy.state_size or agent.policy.frame_stack > 1:
                answer, states[index] = answer
            answers.append(answer)
        for one, other in zip(*map(leaves, answers), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        obs, _, _, _, info = env.step(answers[0])
    results = [agent.evaluate(env_of(case), 4, deterministic=False) for agent in agents]
    assert results[0].episode_lengths == results[1].episode_lengths


@DEVICES
def test_a_policy_of_ones_own_draws_there(device):
    env = functools.partial(WithSpaces, VECTOR, THREE)
    agent = PPOAgent(OwnPolicy(3, 3), config=PPOConfig(**SMALL), device=device)
    assert all(np.isfinite(update["grad_norm"]) for update in learn(agent, env))
    drawn = [int(agent.act(np.zeros(3, np.float32), deterministic=False)) for _ in range(30)]
    assert set(drawn) == {0, 1, 2}
    assert len(agent.evaluate(env, 2, deterministic=False).episode_returns) == 2


@REAL_DEVICES
def test_a_program_is_exported_from_there(device, tmp_path):
    case = CASES["normalised"]
    agent = make_agent(case, device)
    agent._build(*case[:2])
    (path,) = agent.export(tmp_path / "policy.pt2")
    program, obs = torch.export.load(path).module(), torch.randn(5, 3)
    assert program(obs).tolist() == agent.act(obs.numpy()).tolist()


class ShadesEnv(gymnasium.Env):
    """Pays 1 for naming the shade of a noisy image: dark, grey or bright."""

    observation_space, action_space = IMAGE, THREE

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.look(), {}

    def look(self):
        self.shade = int(self.np_random.integers(3))
        noise = self.np_random.integers(0, 50, IMAGE.shape)
        return (100 * self.shade + noise).astype(np.uint8)

    def step(self, action):
        paid = float(action == self.shade)
        return self.look(), paid, True, False, {}


@REAL_DEVICES
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_images_are_learned(device, precision):
    config = PPOConfig(
        num_envs=16,
        num_steps=8,
        minibatch_size=32,
        num_epochs=4,
        learning_rate={"linear": [1e-3, 0.0]},
        num_workers=0,
        policy=PolicyConfig(hidden_sizes=(), shared=True, cnn_features=16, precision=precision),
    )
    agent = PPOAgent(config=config, device=device).learn(ShadesEnv, 32 * 128)
    assert agent.evaluate(ShadesEnv, 64).mean_return > 0.9


@REAL_DEVICES
def test_cartpole_is_learned(device):
    config = PPOConfig(
        num_envs=8,
        num_steps=64,
        minibatch_size=128,
        num_epochs=8,
        learning_rate=1e-3,
        gae_lambda=0.8,
        gamma=0.98,
        num_workers=0,
    )
    agent = PPOAgent(config=config, device=device).learn("CartPole-v1", 40 * 512)
    assert agent.evaluate("CartPole-v1", 10).mean_return > 195  # what counts as solved


@REAL_DEVICES
def test_half_cheetah_learns_as_on_the_cpu(device):
    pytest.importorskip("mujoco")
    config = PPOConfig(num_envs=4, num_steps=64, minibatch_size=64, num_epochs=4, num_workers=0)
    agents = [PPOAgent(config=config, seed=1, device=place) for place in (device, "cpu")]
    metrics = [learn(agent, "HalfCheetah-v5", 3) for agent in agents]
    # Later the numbers part: what falls over falls elsewhere.
    assert_near(*(updates[:1] for updates in metrics))
    for updates in metrics:
        numbers = [x for update in updates for key, x in update.items() if "episode" not in key]
        assert np.isfinite(numbers).all()
        # Of 24 seeds 23 go below 0.7, this one to 0.25, on processors that round otherwise too; one
        # (0) stays about 1. The explained variance rises with no more than 18 of them.
        assert updates[-1]["value_loss"] < 0.9 * updates[0]["value_loss"]
