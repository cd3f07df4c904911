"""Draw one sample's part of the clipped objective and its derivative, over the ratio."""

import torch
from matplotlib.figure import Figure

from ppo import ppo_loss

CLIP_RANGE = 0.2
RATIOS = torch.linspace(0.3, 1.7, 281)


def objective(ratio, advantage, clip_range):
    """Return the objective of one sample and its derivative by the log-probability."""
    log_prob = ratio.log().reshape(1).requires_grad_()
    loss = ppo_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), clip_range=clip_range)
    (gradient,) = torch.autograd.grad(loss.total, log_prob)
    return -loss.total.item(), -gradient.item()


def draw(path):
    """Write the figure to ``path``."""
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, advantage in enumerate((1.0, -1.0)):
        curves = [objective(ratio, advantage, CLIP_RANGE) for ratio in RATIOS]
        value, gradient = map(torch.tensor, zip(*curves, strict=True))
        for ax, clipped, unclipped in (
            (axes[0, column], value, RATIOS * advantage),
            (axes[1, column], gradient, RATIOS * advantage),
        ):
            flat = RATIOS[gradient == 0]
            ax.axvspan(flat.min(), flat.max(), color="0.9")
            ax.plot(RATIOS, unclipped, "--", color="0.5", label="unclipped")
            ax.plot(RATIOS, clipped, color="tab:blue", linewidth=2, label="clipped")
            ax.axhline(0, color="0.7", linewidth=0.8)
            for edge in (1 - CLIP_RANGE, 1, 1 + CLIP_RANGE):
                ax.axvline(edge, color="0.7", linewidth=0.8, linestyle=":")
        axes[0, column].plot(1, advantage, "o", color="tab:red")
        axes[0, column].set_title(f"advantage {'> 0' if advantage > 0 else '< 0'}")
        axes[1, column].set_xlabel("ratio ρ")
    axes[0, 0].set_ylabel("objective")
    axes[1, 0].set_ylabel("derivative by log π")
    axes[0, 0].legend(loc="upper left")
    ticks = (0.4, 1 - CLIP_RANGE, 1, 1 + CLIP_RANGE, 1.6)
    axes[1, 0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    figure.savefig(path)
