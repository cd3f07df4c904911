"""Moved to `ppo.recording.kernels`; this file goes away."""
from ppo.recording.kernels import *  # noqa: F403
