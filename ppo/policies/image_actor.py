"""An actor of images that environments' processes run by themselves: convolutions, then NumPy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ppo._threads import threads
from ppo.policies.bodies import NatureCNN

__all__ = ["ImageActor"]


class ImageActor:
    """A frozen copy of an encoder, and what chooses actions from its features.

    Its processes do not wait for one another at every step, as they would for an actor elsewhere.

    Args:
        encoder: From images `[G, ...]` to features `[G, F]`; copied.
        choose: From features `[G, F]` and noise `[G, k]` to raw actions `[G, ...]`.
    """

    group_size = 4  # half of eight environments, so that two workers compute nothing twice

    def __init__(
        self, encoder: NatureCNN, choose: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> None:
        own = copy.deepcopy(encoder).requires_grad_(False)
        first: Any = own.convolutions[0]
        first.weight.mul_(first.scale)
        self._take(own)
        self._choose = choose

    def _take(self, encoder: NatureCNN) -> None:
        """Do once what would be done to the weights at every step."""
        first: Any = encoder.convolutions[0]
        first.scale = 1.0  # they are multiplied by it already
        if encoder.precision == "bfloat16":
            encoder.bfloat16()
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._encoder = encoder

    def __call__(self, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Raw actions `[G, ...]` for images `[G, ...]` and noise `[G, k]`."""
        with torch.no_grad(), threads(1):
            features = self._encoder(torch.from_numpy(obs))
        return self._choose(features.numpy(), noise)

    # Not as tensors, which multiprocessing would move into shared memory.

    def __getstate__(self) -> Any:
        tensors = self._encoder.state_dict()
        arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
        return self._encoder.options, self._encoder.precision, arrays, self._choose

    def __setstate__(self, state: Any) -> None:
        options, precision, arrays, self._choose = state
        encoder = NatureCNN(**options, precision=precision, generator=None).requires_grad_(False)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        encoder.load_state_dict(tensors, assign=True)
        self._take(encoder)
