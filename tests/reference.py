"""Definitions, written as the papers write them: slow, obvious, NumPy float64.

Sums over indices, never recursions; one trajectory ``[T]`` at a time. `columns` applies them to
arrays with further axes.
"""

import math

import numpy as np


def columns(definition, *arrays, **settings):
    """Apply a definition for ``[T]`` to every column of arrays ``[T, ...]``."""
    result = np.empty(arrays[0].shape)
    for index in np.ndindex(arrays[0].shape[1:]):
        column = (slice(None), *index)
        result[column] = definition(*(x[column] for x in arrays), **settings)
    return result


def steps_to_end(t, terminated, truncated):
    """Number of steps from t to the end of its episode or of the data, t included."""
    for k in range(t, len(terminated)):
        if terminated[k] or truncated[k]:
            return k - t + 1
    return len(terminated) - t


def bootstrap(t, next_values, terminated):
    return 0.0 if terminated[t] else next_values[t]


def advantages(rewards, values, next_values, terminated, truncated, *, gamma, gae_lambda):
    """Schulman et al. 2016, equation 16: Â_t = Σ_k (γλ)^k δ_{t+k}, within the episode."""
    delta = [
        rewards[t] + gamma * bootstrap(t, next_values, terminated) - values[t]
        for t in range(len(rewards))
    ]
    return [
        sum(
            (gamma * gae_lambda) ** k * delta[t + k]
            for k in range(steps_to_end(t, terminated, truncated))
        )
        for t in range(len(rewards))
    ]


def n_step_returns(rewards, next_values, terminated, truncated, *, n, gamma):
    """Sutton and Barto, equation 7.1, cut at the ends of episodes and data."""
    result = []
    for t in range(len(rewards)):
        m = min(n, steps_to_end(t, terminated, truncated))
        paid = sum(gamma**k * rewards[t + k] for k in range(m))
        result.append(paid + gamma**m * bootstrap(t + m - 1, next_values, terminated))
    return result


def lambda_returns(rewards, next_values, terminated, truncated, *, gamma, gae_lambda):
    """Sutton and Barto, equation 12.3: the weighted mean of the n-step returns."""
    horizon = len(rewards)
    n_step = [
        n_step_returns(rewards, next_values, terminated, truncated, n=n, gamma=gamma)
        for n in range(1, horizon + 1)
    ]
    result = []
    for t in range(horizon):
        m = steps_to_end(t, terminated, truncated)
        mean = sum((1 - gae_lambda) * gae_lambda ** (n - 1) * n_step[n - 1][t] for n in range(1, m))
        result.append(mean + gae_lambda ** (m - 1) * n_step[m - 1][t])
    return result


def discounted_returns(rewards, terminated, truncated, *, gamma):
    """Sum of the discounted rewards that the data hold of each episode."""
    return [
        sum(gamma**k * rewards[t + k] for k in range(steps_to_end(t, terminated, truncated)))
        for t in range(len(rewards))
    ]


def policy_objective(
    log_probs, old_log_probs, advantages, clip_range, clip_range_high=None, dual_clip=None
):
    """Schulman et al. 2017, equation 7, and Ye et al. 2020, row by row."""
    high = clip_range if clip_range_high is None else clip_range_high
    terms = []
    for new, old, advantage in zip(log_probs, old_log_probs, advantages, strict=True):
        ratio = math.exp(new - old)
        clipped = min(max(ratio, 1 - clip_range), 1 + high)
        term = min(ratio * advantage, clipped * advantage)
        if dual_clip is not None and advantage < 0:
            term = max(term, dual_clip * advantage)
        terms.append(term)
    return sum(terms) / len(terms)


def value_loss(values, returns, old_values=None, value_clip_range=None):
    errors = []
    for row, (value, target) in enumerate(zip(values, returns, strict=True)):
        error = (value - target) ** 2
        if value_clip_range is not None:
            old = old_values[row]
            clipped = min(max(value, old - value_clip_range), old + value_clip_range)
            error = max(error, (clipped - target) ** 2)
        errors.append(error)
    return sum(errors) / len(errors)


def approximate_kl(log_probs, old_log_probs):
    log_ratios = [new - old for new, old in zip(log_probs, old_log_probs, strict=True)]
    return sum(math.exp(x) - 1 - x for x in log_ratios) / len(log_ratios)


def clip_fraction(log_probs, old_log_probs, clip_range, clip_range_high=None):
    high = clip_range if clip_range_high is None else clip_range_high
    ratios = [math.exp(new - old) for new, old in zip(log_probs, old_log_probs, strict=True)]
    return sum(ratio < 1 - clip_range or ratio > 1 + high for ratio in ratios) / len(ratios)


def weight_decayed_adam(parameters, gradients, learning_rate, weight_decay, eps):
    """Loshchilov and Hutter 2019, algorithm 2, number by number; `gradients` step by step."""
    result = []
    for number, x in enumerate(parameters):
        m = v = 0.0
        for step, gradient in enumerate(gradients, 1):
            g = gradient[number]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            adam = (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + eps)
            x = x - learning_rate * (adam + weight_decay * x)
        result.append(x)
    return result


def discounted_sums(rewards, ended, valid, gamma):
    """G at every valid step of one environment: its episode's rewards so far, discounted."""
    sums, episode = [], []
    for reward, end, counts in zip(rewards, ended, valid, strict=True):
        if not counts:
            continue
        episode.append(reward)
        sums.append(sum(gamma ** (len(episode) - 1 - k) * r for k, r in enumerate(episode)))
        if end:
            episode = []
    return sums
