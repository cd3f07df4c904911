"""Stable-Baselines3, in one process: its subprocesses are slower on light environments."""

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize


def train(workload, num_updates, seed, tick):
    class Timed(PPO):
        def train(self):
            super().train()
            tick()

    def maybe_linear(value):
        return (lambda remaining: remaining * value) if workload.decay else value

    if workload.pixels:
        # Its wrapper skips frames by itself; the environment would skip three of four before.
        once = {"frameskip": 1}
        env = make_atari_env(workload.env, n_envs=workload.num_envs, seed=seed, env_kwargs=once)
        env = VecFrameStack(env, n_stack=4)
    else:
        env = make_vec_env(workload.env, n_envs=workload.num_envs, seed=seed)
    if workload.normalize:
        env = VecNormalize(env, gamma=workload.gamma)
    sizes = [workload.hidden_size, workload.hidden_size]
    policy_kwargs = {
        "net_arch": {"pi": sizes, "vf": sizes},
        "activation_fn": torch.nn.Tanh,
        "optimizer_kwargs": {"eps": workload.adam_eps},
    }
    if workload.pixels:
        policy_kwargs = {"optimizer_kwargs": {"eps": workload.adam_eps}}
    model = Timed(
        "CnnPolicy" if workload.pixels else "MlpPolicy",
        env,
        n_steps=workload.num_steps,
        batch_size=workload.minibatch_size,
        n_epochs=workload.num_epochs,
        gamma=workload.gamma,
        gae_lambda=workload.gae_lambda,
        learning_rate=maybe_linear(workload.learning_rate),
        clip_range=maybe_linear(workload.clip_range),
        vf_coef=workload.value_coef,
        max_grad_norm=workload.max_grad_norm,
        policy_kwargs=policy_kwargs,
        seed=seed,
        device="cpu",
    )
    model.learn(num_updates * workload.rollout_size)

    def act(obs):
        obs = env.normalize_obs(obs) if workload.normalize else obs
        return model.predict(obs, deterministic=True)[0]

    return act
