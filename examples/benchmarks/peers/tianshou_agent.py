"""Tianshou, by its own parts below the trainer. It scales returns where others scale rewards."""

import gymnasium
import torch
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv, VectorEnvNormObs
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
from tianshou.utils.torch_utils import policy_within_training_step, torch_train_mode
from torch import nn
from torch.distributions import Categorical, Independent, Normal

from peers import UnsupportedError


def gaussian(parameters):
    mean, std = parameters
    return Independent(Normal(mean, std), 1)


def categorical(logits):
    return Categorical(logits=logits)


def train(workload, num_updates, seed, tick):
    if workload.decay:
        raise UnsupportedError("no schedule of the clip range")
    torch.manual_seed(seed)
    envs = DummyVectorEnv([lambda: gymnasium.make(workload.env)] * workload.num_envs)
    envs.seed(seed)
    observation_space, action_space = envs.observation_space[0], envs.action_space[0]
    if workload.normalize:
        envs = VectorEnvNormObs(envs)
    discrete = isinstance(action_space, gymnasium.spaces.Discrete)
    sizes = (workload.hidden_size, workload.hidden_size)

    def body():
        return Net(state_shape=observation_space.shape, hidden_sizes=sizes, activation=nn.Tanh)

    if discrete:
        actor = DiscreteActor(
            preprocess_net=body(), action_shape=action_space.n, softmax_output=False
        )
        critic = DiscreteCritic(preprocess_net=body())
    else:
        actor = ContinuousActorProbabilistic(
            preprocess_net=body(), action_shape=action_space.shape, unbounded=True
        )
        critic = ContinuousCritic(preprocess_net=body())
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=categorical if discrete else gaussian,
        deterministic_eval=True,
        action_space=action_space,
        action_scaling=False,
        action_bound_method=None if discrete else "clip",
    )
    algorithm = PPO(
        policy=policy,
        critic=critic,
        optim=AdamOptimizerFactory(lr=workload.learning_rate, eps=workload.adam_eps),
        eps_clip=workload.clip_range,
        vf_coef=workload.value_coef,
        ent_coef=0.0,
        max_grad_norm=workload.max_grad_norm,
        gae_lambda=workload.gae_lambda,
        gamma=workload.gamma,
        return_scaling=workload.normalize,
    )
    buffer = VectorReplayBuffer(workload.rollout_size, workload.num_envs)
    collector = Collector(algorithm, envs, buffer)
    collector.reset()
    for _ in range(num_updates):
        with policy_within_training_step(policy):
            collector.collect(n_step=workload.rollout_size)
            with torch_train_mode(algorithm):
                algorithm.update(buffer, workload.minibatch_size, workload.num_epochs)
        collector.reset_buffer(keep_statistics=True)
        tick()

    @torch.no_grad()
    def act(obs):
        if workload.normalize:
            obs = envs.get_obs_rms().norm(obs)
        outputs = actor(obs)[0]
        return outputs.argmax(-1).numpy() if discrete else outputs[0].numpy()

    return act
