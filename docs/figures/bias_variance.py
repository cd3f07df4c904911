"""Measure bias and variance of policy gradients on a random walk, over lambda and gamma.

The walk has nine states in a row; the policy goes left or right with equal chance, each step pays
noise, and leaving on the right pays 1 more. Values and advantages are known exactly, by solving a
linear system.
"""

import numpy as np
from matplotlib.figure import Figure

from ppo import gae

NUM_STATES = 9
NUM_STEPS = 150
WALKS_PER_ACTION = 2000
REWARD_NOISE = 0.3
BATCH = 64
LAMBDAS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
GAMMAS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0)


def exact_values(gamma):
    """Return V of the states, with the two ends (worth 0) around them: ``[NUM_STATES + 2]``."""
    step = np.eye(NUM_STATES, k=1) + np.eye(NUM_STATES, k=-1)
    mean_reward = np.zeros(NUM_STATES)
    mean_reward[-1] = 0.5
    inner = np.linalg.solve(np.eye(NUM_STATES) - gamma * step / 2, mean_reward)
    return np.concatenate([[0.0], inner, [0.0]])


def exact_advantages():
    """Return the undiscounted advantage of each first action: ``[NUM_STATES, 2]``."""
    values = exact_values(gamma=1.0)
    left = values[:-2]
    right = values[2:].copy()
    right[-1] = 1.0
    return np.stack([left, right], axis=1) - values[1:-1, None]


def walk(rng):
    """Simulate walks from every state with either first action; time first, then walks."""
    start = np.repeat(np.arange(1, NUM_STATES + 1), 2 * WALKS_PER_ACTION)
    first = np.tile(np.repeat([-1, 1], WALKS_PER_ACTION), NUM_STATES)
    moves = rng.choice([-1, 1], size=(NUM_STEPS, len(start)))
    moves[0] = first
    states = np.empty((NUM_STEPS + 1, len(start)), dtype=int)
    states[0] = start
    for t in range(NUM_STEPS):
        inside = (states[t] > 0) & (states[t] <= NUM_STATES)
        states[t + 1] = states[t] + moves[t] * inside
    terminated = (states[1:] == 0) | (states[1:] == NUM_STATES + 1)
    rewards = REWARD_NOISE * rng.normal(size=moves.shape)
    rewards += (states[1:] == NUM_STATES + 1) & (states[:-1] == NUM_STATES)
    return states, rewards, terminated


def errors(data, values, gamma, gae_lambda):
    """Return squared bias and variance of the first step's policy gradient, averaged over states.

    The policy is a coin whose logit is the parameter, so a step's gradient is plus or minus half
    the advantage, and the exact one a quarter of the difference between the actions' advantages.
    """
    states, rewards, terminated = data
    estimate = gae(
        rewards,
        values[states[:-1]],
        values[states[1:]],
        terminated,
        gamma=gamma,
        gae_lambda=gae_lambda,
    )
    advantages = estimate.advantages[0].reshape(NUM_STATES, 2, WALKS_PER_ACTION)
    samples = (advantages * [[-0.5], [0.5]]).reshape(NUM_STATES, -1)
    exact = exact_advantages() @ [-0.25, 0.25]
    variance = samples.var(axis=-1)
    # The squared error of a mean of n samples holds variance / n that is not bias.
    squared_bias = (samples.mean(axis=-1) - exact) ** 2 - variance / samples.shape[-1]
    return squared_bias.mean(), variance.mean() / BATCH


def measure():
    """Return rows (squared bias, variance) over lambda and over gamma."""
    data = walk(np.random.default_rng(0))
    flawed = exact_values(gamma=1.0)
    flawed[1:-1] += 0.25 * np.sin(np.arange(1, NUM_STATES + 1) * 2.0)
    over_lambda = [errors(data, flawed, 1.0, gae_lambda) for gae_lambda in LAMBDAS]
    over_gamma = [errors(data, exact_values(gamma), gamma, 1.0) for gamma in GAMMAS]
    return np.array(over_lambda), np.array(over_gamma)


def draw(path):
    """Write the figure to ``path``."""
    over_lambda, over_gamma = measure()
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, x, rows, label in (
        (axes[0], LAMBDAS, over_lambda, "λ   (γ = 1, flawed values)"),
        (axes[1], GAMMAS, over_gamma, "γ   (λ = 1, exact values for γ)"),
    ):
        squared_bias, variance = rows.T
        total = squared_bias + variance
        ax.plot(x, squared_bias, "o-", color="tab:red", label="bias²")
        ax.plot(x, variance, "s-", color="tab:blue", label="variance")
        ax.plot(x, total, color="black", linewidth=2, label="mean squared error")
        ax.plot(x[total.argmin()], total.min(), "*", color="black", markersize=13)
        ax.set_xlabel(label)
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("squared error of the gradient")
    axes[0].legend()
    figure.savefig(path)
