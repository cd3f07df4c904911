"""Files of one order of the parameters are read by policies of another."""

import pytest
import torch
from environments import CountingEnv
from small_policies import OwnPolicy, assert_bitwise_equal
from torch import nn
from torch.nn.utils import prune

from ppo import PolicyConfig, PPOAgent, PPOConfig
from ppo.errors import CheckpointError
from ppo.learner.parameter_order import in_order

CONFIG = PPOConfig(
    num_envs=2,
    num_steps=16,
    num_epochs=2,
    minibatch_size=16,
    max_grad_norm=0.1,
    policy=PolicyConfig(hidden_sizes=(8, 8)),
)
ROLLOUT = 32
LAYERS = ("first", "second", "third")


class Deep(OwnPolicy):
    """Layers of the same size are called in the order of their names, defined in the given one."""

    def __init__(self, order=LAYERS, size=2, renamed=False):
        super().__init__(2, 2)
        for name in order:
            setattr(self, name, nn.Linear(2, size if name == "third" else 2))
        if renamed:
            self.fourth = self.third
            del self.third
        with torch.no_grad():
            for name, tensor in sorted(self.named_parameters()):
                tensor.copy_(torch.linspace(-1.0, 1.0, tensor.numel()).view(tensor.shape))
                tensor.add_(len(name) / 10)

    def act(self, obs, **options):
        return super().act(self.features(obs), **options)

    def features(self, obs):
        return self.third(self.second(self.first(obs / 1000.0).tanh()).tanh())

    def evaluate(self, obs, actions):
        result = super().evaluate(self.features(obs), actions)
        return result._replace(values=self.value(obs))

    def value(self, obs):
        return super().value(self.features(obs))


def kept(agent):
    """What the optimizer keeps, by the names of parameters."""
    learner = agent._learner
    order = learner.parameter_order()
    alphabetical = {network: sorted(entries) for network, entries in order.items()}
    return in_order(learner.state_dict(), order, alphabetical)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "agent.safetensors"


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "AdamW", "SGD", "Adafactor"])
def test_a_policy_of_layers_in_another_order_goes_on_with_what_was_saved(path, optimizer, released):
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    config = CONFIG.replace(optimizer=optimizer, optimizer_kwargs=options)
    policy = Deep()
    policy.second.requires_grad_(not released)
    agent = PPOAgent(policy, config=config).learn(CountingEnv, ROLLOUT)
    policy.second.requires_grad_(True)
    agent.learn(CountingEnv, 2 * ROLLOUT)
    agent.save(path)
    other = PPOAgent.load(path, policy=Deep(LAYERS[::-1]))
    names = [[name for name, _ in one.policy.named_parameters()] for one in (agent, other)]
    assert names[0] != names[1]
    assert_bitwise_equal(kept(agent), kept(other))
    assert agent._learner.state_dict().keys() == other._learner.state_dict().keys()
    for one in (agent, other):
        one.learn(CountingEnv, 2 * ROLLOUT)
    # Only the norm behind the clipping is a sum in another order.
    for name, tensor in agent.policy.state_dict().items():
        torch.testing.assert_close(other.policy.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "Adafactor"])
def test_a_pruned_policy_is_read_by_the_default_one(path, optimizer):
    agent = PPOAgent(config=CONFIG.replace(optimizer=optimizer)).learn(CountingEnv, ROLLOUT)
    layer = next(m for m in agent.policy.actor_body if isinstance(m, nn.Linear))
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")
    assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]
    agent.learn(CountingEnv, ROLLOUT)
    agent.save(path)
    loaded = PPOAgent.load(path)
    assert_bitwise_equal(kept(agent), kept(loaded))
    for one in (agent, loaded):
        one.learn(CountingEnv, ROLLOUT)
    for name, tensor in agent.policy.state_dict().items():
        torch.testing.assert_close(loaded.policy.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_order_is_that_of_the_optimizer_if_another_came_after_the_update(path):
    agent = PPOAgent(config=CONFIG).learn(CountingEnv, ROLLOUT)
    before = kept(agent)
    layer = next(m for m in agent.policy.actor_body if isinstance(m, nn.Linear))
    prune.identity(layer, "weight")
    prune.remove(layer, "weight")
    agent.save(path)
    assert_bitwise_equal(kept(PPOAgent.load(path)), before)


def test_a_parameter_exchanged_since_the_update_has_no_place_in_the_order(path):
    agent = PPOAgent(Deep(), config=CONFIG).learn(CountingEnv, ROLLOUT)
    agent.policy.second = nn.Linear(2, 2)
    assert agent._learner.parameter_order() is None
    agent.save(path)
    loaded = PPOAgent.load(path, policy=Deep())
    assert_bitwise_equal(loaded._learner.state_dict(), agent._learner.state_dict())


def test_other_names_or_sizes_are_an_error_that_says_which():
    ours = {"actor": [["one", 2], ["two", 3]], "critic": [["three", 1]]}
    assert in_order({}, ours, ours) == {}
    for theirs, words in [
        (
            {"actor": [["one", 2], ["zwei", 3]]},
            r"of actor .*has \['zwei \(3\)'\].* \['two \(3\)'\]",
        ),
        ({"actor": [["one", 3], ["two", 3]]}, r"of actor .*has \['one \(3\)'\].* \['one \(2\)'\]"),
        ({"critic": []}, r"of critic .*has \[\].* \['three \(1\)'\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            in_order({}, ours | theirs, ours)


def test_parameters_that_another_network_trains_are_named(path):
    class Grouped(Deep):
        def parameter_groups(self):
            return {"late": [*self.third.parameters()]}

    PPOAgent(Deep(), config=CONFIG).learn(CountingEnv, ROLLOUT).save(path)
    with pytest.raises(CheckpointError, match=r"state of late .*has \[\].*third\.weight \(4\)"):
        PPOAgent.load(path, policy=Grouped())
