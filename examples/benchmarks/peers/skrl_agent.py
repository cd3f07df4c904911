"""skrl. It scales value targets where the others scale rewards, its advantages are normalised over
the rollout, and it knows no schedule of the clip range."""

import gymnasium
import torch
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, GaussianMixin, Model
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed
from torch import nn

from peers import UnsupportedError


def mlp(num_inputs, width, num_outputs):
    return nn.Sequential(
        nn.Linear(num_inputs, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, num_outputs),
    )


class Discrete(CategoricalMixin, Model):
    def __init__(self, width, **spaces):
        Model.__init__(self, **spaces)
        CategoricalMixin.__init__(self)
        self.net = mlp(self.num_observations, width, self.num_actions)

    def compute(self, inputs, role=""):
        return self.net(inputs["observations"]), {}


class Gaussian(GaussianMixin, Model):
    def __init__(self, width, **spaces):
        Model.__init__(self, **spaces)
        GaussianMixin.__init__(self)
        self.net = mlp(self.num_observations, width, self.num_actions)
        self.log_std = nn.Parameter(torch.zeros(self.num_actions))

    def compute(self, inputs, role=""):
        return self.net(inputs["observations"]), {"log_std": self.log_std}


class Value(DeterministicMixin, Model):
    def __init__(self, width, **spaces):
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.net = mlp(self.num_observations, width, 1)

    def compute(self, inputs, role=""):
        return self.net(inputs["observations"]), {}


def train(workload, num_updates, seed, tick):
    if workload.decay:
        raise UnsupportedError("no schedule of the clip range")

    class Timed(PPO):
        def update(self, *, timestep, timesteps):
            super().update(timestep=timestep, timesteps=timesteps)
            tick()

    set_seed(seed)
    env = wrap_env(
        gymnasium.make_vec(workload.env, workload.num_envs, vectorization_mode="sync"),
        verbose=False,
    )
    spaces = {
        "observation_space": env.observation_space,
        "action_space": env.action_space,
        "device": "cpu",
    }
    discrete = isinstance(env.action_space, gymnasium.spaces.Discrete)
    policy = (Discrete if discrete else Gaussian)(workload.hidden_size, **spaces)
    cfg = PPO_CFG(
        rollouts=workload.num_steps,
        learning_epochs=workload.num_epochs,
        mini_batches=workload.rollout_size // workload.minibatch_size,
        discount_factor=workload.gamma,
        gae_lambda=workload.gae_lambda,
        learning_rate=workload.learning_rate,
        grad_norm_clip=workload.max_grad_norm,
        ratio_clip=workload.clip_range,
        value_clip=0.0,
        value_loss_scale=workload.value_coef,
        time_limit_bootstrap=True,
    )
    if workload.normalize:
        cfg.observation_preprocessor = RunningStandardScaler
        cfg.observation_preprocessor_kwargs = {"size": env.observation_space, "device": "cpu"}
        cfg.value_preprocessor = RunningStandardScaler
        cfg.value_preprocessor_kwargs = {"size": 1, "device": "cpu"}
    cfg.experiment.write_interval = 0  # no files; the others write none either
    cfg.experiment.checkpoint_interval = 0
    agent = Timed(
        models={"policy": policy, "value": Value(workload.hidden_size, **spaces)},
        memory=RandomMemory(
            memory_size=workload.num_steps, num_envs=workload.num_envs, device="cpu"
        ),
        cfg=cfg,
        **spaces,
    )
    settings = {
        "timesteps": num_updates * workload.num_steps,
        "headless": True,
        "disable_progressbar": True,
    }
    SequentialTrainer(env=env, agents=agent, cfg=settings).train()

    @torch.no_grad()
    def act(obs):
        inputs = {"observations": torch.as_tensor(obs, dtype=torch.float32)}
        if workload.normalize:
            inputs["observations"] = agent._observation_preprocessor(inputs["observations"])
        outputs = policy.compute(inputs)[0]
        return (outputs.argmax(-1) if discrete else outputs).numpy()

    return act
