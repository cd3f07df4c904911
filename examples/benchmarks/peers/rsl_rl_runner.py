"""rsl_rl. It has Gaussian actions only and Adam's usual epsilon; rewards are scaled around it."""

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from rsl_rl.env import VecEnv
from rsl_rl.runners import OnPolicyRunner
from tensordict import TensorDict

from peers import UnsupportedError
from peers.plain_torch import RunningStatistics


class TensorEnvs(VecEnv):
    """Gymnasium's environments in the words of rsl_rl."""

    def __init__(self, workload, seed):
        make = [lambda: gymnasium.make(workload.env)] * workload.num_envs
        self.envs = SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)
        self.space = self.envs.single_action_space
        if not isinstance(self.space, gymnasium.spaces.Box):
            raise UnsupportedError("Gaussian actions only")
        self.num_envs, self.num_actions = workload.num_envs, self.space.shape[0]
        self.max_episode_length = self.envs.envs[0].spec.max_episode_steps
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long)
        self.device, self.cfg, self.gamma = "cpu", {}, workload.gamma
        self.scales, self.statistics = workload.normalize, RunningStatistics()
        self.returns = np.zeros(self.num_envs)
        self.obs = self.envs.reset(seed=seed)[0]

    def get_observations(self):
        obs = torch.as_tensor(self.obs, dtype=torch.float32)
        return TensorDict({"policy": obs}, batch_size=[self.num_envs])

    def step(self, actions):
        actions = actions.numpy().clip(self.space.low, self.space.high)
        self.obs, rewards, terminated, truncated, _ = self.envs.step(actions)
        over = terminated | truncated
        if self.scales:
            self.returns = self.returns * self.gamma + rewards
            self.statistics.update(self.returns)
            self.returns[over] = 0.0
            rewards = rewards / self.statistics.std
        extras = {"time_outs": torch.as_tensor(truncated & ~terminated)}
        rewards = torch.as_tensor(rewards, dtype=torch.float32)
        return self.get_observations(), rewards, torch.as_tensor(over), extras


def train(workload, num_updates, seed, tick):
    if workload.decay:
        raise UnsupportedError("no schedule of the clip range")
    torch.manual_seed(seed)
    env = TensorEnvs(workload, seed)
    network = {
        "class_name": "MLPModel",
        "hidden_dims": [workload.hidden_size, workload.hidden_size],
        "activation": "tanh",
        "obs_normalization": workload.normalize,
    }
    settings = {
        "num_steps_per_env": workload.num_steps,
        "save_interval": num_updates + 1,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "multi_gpu": None,
        "actor": {
            **network,
            "distribution_cfg": {"class_name": "GaussianDistribution", "std_type": "log"},
        },
        "critic": network,
        "algorithm": {
            "class_name": "PPO",
            "num_learning_epochs": workload.num_epochs,
            "num_mini_batches": workload.rollout_size // workload.minibatch_size,
            "clip_param": workload.clip_range,
            "gamma": workload.gamma,
            "lam": workload.gae_lambda,
            "value_loss_coef": workload.value_coef,
            "entropy_coef": 0.0,
            "learning_rate": workload.learning_rate,
            "max_grad_norm": workload.max_grad_norm,
            "use_clipped_value_loss": False,
            "schedule": "fixed",
            "normalize_advantage_per_mini_batch": True,
        },
    }
    runner = OnPolicyRunner(env, settings, device="cpu")
    update = runner.alg.update

    def timed_update():
        metrics = update()
        tick()
        return metrics

    runner.alg.update = timed_update
    runner.learn(num_updates)
    policy = runner.get_inference_policy()

    @torch.no_grad()
    def act(obs):
        obs = torch.as_tensor(obs, dtype=torch.float32)
        return policy(TensorDict({"policy": obs}, batch_size=[len(obs)])).numpy()

    return act
