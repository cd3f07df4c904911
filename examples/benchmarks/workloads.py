"""What every library is given to do, with the same numbers for all."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Two 64 x 64 tanh networks trained by PPO; what is not named here has SB3's default value.

    With `pixels` it is one NatureCNN for actor and critic, on four stacked frames of 84 x 84, and
    torch has all its threads.

    `skip` updates go by before the steady state: libraries record, compile or choose something at
    their beginning. The `updates` behind them are measured, and are the same ones for everybody.
    """

    env: str
    num_envs: int
    num_steps: int
    num_epochs: int
    minibatch_size: int
    normalize: bool  # observations and rewards, by running statistics
    gamma: float = 0.99
    gae_lambda: float = 0.95
    learning_rate: float = 3e-4
    clip_range: float = 0.2
    decay: bool = False  # learning rate and clip range fall linearly to 0
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    adam_eps: float = 1e-5
    hidden_size: int = 64
    pixels: bool = False
    skip: int = 0
    updates: int

    @property
    def rollout_size(self):
        return self.num_envs * self.num_steps


HALFCHEETAH = Workload(
    env="HalfCheetah-v5",
    num_envs=8,
    num_steps=256,
    num_epochs=10,
    minibatch_size=64,
    normalize=True,
    skip=5,
    updates=20,
)

CARTPOLE = Workload(
    env="CartPole-v1",
    num_envs=8,
    num_steps=128,
    num_epochs=4,
    minibatch_size=256,
    normalize=False,
    skip=40,
    updates=160,
)

STEADY = {
    "cartpole": CARTPOLE,
    "halfcheetah-8": HALFCHEETAH,
    "halfcheetah-1": dataclasses.replace(HALFCHEETAH, num_envs=1, num_steps=2048),
}

# Breakout, with the usual preprocessing.
PIXELS = {
    "breakout": dataclasses.replace(
        CARTPOLE,
        env="ale_py:ALE/Breakout-v5",
        learning_rate=2.5e-4,
        pixels=True,
        skip=1,
        updates=4,
    ),
}

# From the start of the process to a trained agent: 100,000 and 200,000 steps, rounded up.
WHOLE = {
    # The settings of RL Baselines3 Zoo.
    "cartpole-whole": Workload(
        env="CartPole-v1",
        num_envs=8,
        num_steps=32,
        num_epochs=20,
        minibatch_size=256,
        normalize=False,
        gamma=0.98,
        gae_lambda=0.8,
        learning_rate=1e-3,
        clip_range=0.2,
        decay=True,
        updates=391,
    ),
    "halfcheetah-whole": dataclasses.replace(HALFCHEETAH, skip=0, updates=98),
}

WORKLOADS = STEADY | PIXELS | WHOLE
