"""Networks between an observation and a feature vector: `MLP` and `NatureCNN`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ppo.policies.tanh import Tanh

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "NatureCNN",
    "StridedConv2d",
    "orthogonal_conv",
    "orthogonal_linear",
    "with_memory",
    "without_values",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def orthogonal_linear(
    num_inputs: int, num_outputs: int, gain: float, generator: torch.Generator | None
) -> nn.Linear:
    """Linear layer with orthogonal weights of the given gain and zero bias (Saxe et al. 2014).

    Without a generator it is a layer on the `meta` device: shapes that take no memory.
    """
    layer = without_values(nn.Linear, num_inputs, num_outputs, device=_device(generator))
    _orthogonal_(layer, gain, generator)
    return layer


class StridedConv2d(nn.Conv2d):
    """A convolution whose kernel is a whole number of strides wide, faster on a CPU.

    Where channels come last in memory, `stride` columns side by side are one column with `stride`
    times the channels, and nothing has to be moved. What remains is a convolution of stride 1 along
    the width, with a narrower kernel: the same sums. A CPU multiplies many channels at once and
    wastes most of that on few: in half precision the first layer of `NatureCNN` takes two thirds
    of the time.

    Args:
        num_inputs: Channels of the input.
        num_outputs: Channels of the output.
        kernel: Height and width of the kernel.
        stride: Step along both axes, a divisor of `kernel`.
        scale: Factor of all inputs. It is applied to the weights, which are fewer.
        device: Of the weights.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        kernel: int,
        stride: int,
        scale: float = 1.0,
        device: str = "cpu",
    ) -> None:
        super().__init__(num_inputs, num_outputs, kernel, stride, device=device)
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs `[B, num_outputs, h, w]` of inputs `[B, num_inputs, H, W]`."""
        step, weight = self.stride[1], self.weight
        if self.scale != 1.0:
            weight = weight * self.scale
        columns = inputs.shape[-1] // step
        if step == 1 or inputs.shape[-1] % step:
            return functional.conv2d(inputs, weight, self.bias, step)
        # [B, C, H, W] -> [B, H, W, C] -> [B, H, W / step, step * C], and back.
        joined = inputs.movedim(1, -1).unflatten(2, (columns, step)).flatten(3).movedim(-1, 1)
        weight = weight.unflatten(3, (-1, step)).movedim(-1, 1).flatten(1, 2)
        return functional.conv2d(joined, weight, self.bias, (step, 1))


def orthogonal_conv(
    num_inputs: int,
    num_outputs: int,
    kernel: int,
    stride: int,
    generator: torch.Generator | None,
    scale: float = 1.0,
) -> StridedConv2d:
    """Convolution with orthogonal weights of gain sqrt(2) and zero bias; generator as above."""
    layer = without_values(
        StridedConv2d, num_inputs, num_outputs, kernel, stride, scale, device=_device(generator)
    )
    _orthogonal_(layer, math.sqrt(2.0), generator)
    return layer


def without_values(
    kind: Callable[..., ModuleT], *sizes: Any, device: str, **options: Any
) -> ModuleT:
    """A layer whose parameters have memory and no values yet; on the `meta` device neither.

    It does not draw on the global generator, as its own initial values would.
    """
    layer = kind(*sizes, device="meta", **options)
    return layer if device == "meta" else with_memory(layer)


def with_memory(module: ModuleT) -> ModuleT:
    """Give what is on the `meta` device memory on the CPU, with no values yet.

    `to_empty` does the same, but imports sympy when it is first called, for a quarter of a second.
    """

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    module._apply(empty)  # type: ignore[no-untyped-call]
    return module


def _device(generator: torch.Generator | None) -> str:
    return "meta" if generator is None else "cpu"


def _orthogonal_(layer: Any, gain: float, generator: torch.Generator | None) -> None:
    if generator is not None:
        nn.init.orthogonal_(layer.weight, gain, generator=generator)
        nn.init.zeros_(layer.bias)


class MLP(nn.Sequential):
    """Linear layers, each followed by the activation; input `[B, ...]` is flattened.

    Args:
        num_inputs: Number of input features.
        hidden_sizes: Width of each layer; empty for the identity.
        activation: A key of `ACTIVATIONS`.
        generator: Draws the initial weights; None leaves them on the `meta` device, without values.
        layer_norm: Normalise the inputs of every activation (Ba et al. 2016).
    """

    def __init__(
        self,
        num_inputs: int,
        hidden_sizes: Sequence[int],
        activation: str,
        generator: torch.Generator | None,
        layer_norm: bool = False,
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        width = num_inputs
        for size in hidden_sizes:
            layers.append(orthogonal_linear(width, size, math.sqrt(2.0), generator))
            if layer_norm:
                layers.append(nn.LayerNorm(size, device=_device(generator)))
            layers.append(ACTIVATIONS[activation]())
            width = size
        super().__init__(*layers)
        self.num_features = width

    def forward(self, inputs: Tensor) -> Tensor:
        """Features `[B, num_features]` of inputs `[B, ...]`; whole numbers become float32."""
        inputs = inputs if inputs.is_floating_point() else inputs.float()
        features = inputs.unsqueeze(-1) if inputs.ndim == 1 else inputs
        for layer in self:
            features = layer(features)
        return features


class NatureCNN(nn.Module):
    """The convolutional encoder of Mnih et al. 2015 (Nature, "Model architecture").

    Takes uint8 images `[B, C, H, W]`, `[B, H, W, C]` or `[B, H, W]` and returns features
    `[B, num_features]`, float32. Images stay uint8 until here; pixels are divided by 255. Of the
    first and last axis of an image, the shorter one is taken to be the channels (the last if
    equal). Inside, channels come last in memory: a CPU's convolutions are then a third faster.

    Args:
        shape: Shape of one image, at least 36 pixels high and wide.
        num_features: Width of the output.
        precision: `"float32"`, or `"bfloat16"` to multiply in half precision (autocast).
        generator: As for `MLP`.
        frames: Number of images in one input `[B, frames, *shape]`, whose channels are joined;
            1 for inputs `[B, *shape]`.

    Attributes:
        precision: As given; it may be changed at any time.
        options: `shape`, `num_features` and `frames`, as given.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        num_features: int = 512,
        precision: Literal["float32", "bfloat16"] = "float32",
        frames: int = 1,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.options: dict[str, Any] = {
            "shape": shape,
            "num_features": num_features,
            "frames": frames,
        }
        self._frames = frames
        self._has_channels = len(shape) == 3
        self._channels_last = self._has_channels and shape[-1] <= shape[0]
        if not self._has_channels:
            shape = (1, *shape)
        elif self._channels_last:
            shape = (shape[-1], *shape[:-1])
        channels, height, width = shape
        if min(height, width) < 36:
            raise ValueError(
                f"NatureCNN needs images of at least 36 x 36 pixels, got {height} x {width}; "
                "resize them, encode them as 'flat' or 'mlp', or flatten them with "
                "gymnasium.wrappers.FlattenObservation"
            )
        self.convolutions = nn.Sequential(
            orthogonal_conv(frames * channels, 32, 8, 4, generator, scale=1.0 / 255.0),
            nn.ReLU(inplace=True),
            orthogonal_conv(32, 64, 4, 2, generator),
            nn.ReLU(inplace=True),
            orthogonal_conv(64, 64, 3, 1, generator),
            nn.Flatten(),
            # Behind it: the gradient of what is flattened has another order in memory.
            nn.ReLU(inplace=True),
        )
        with torch.no_grad():
            image = torch.zeros(1, frames * channels, height, width, device=_device(generator))
            flat = self.convolutions(image).shape[1]
        self.linear = nn.Sequential(
            orthogonal_linear(flat, num_features, math.sqrt(2.0), generator), nn.ReLU(inplace=True)
        )
        self.num_features = num_features

    def forward(self, obs: Tensor) -> Tensor:
        """Features `[B, num_features]` of images `[B, ...]`, or `[B, frames, ...]`."""
        if not self._has_channels:
            obs = obs.unsqueeze(-3)
        elif self._channels_last:
            obs = obs.movedim(-1, -3)
        if self._frames > 1:
            obs = obs.flatten(1, 2)  # [B, frames * C, H, W]
        half = self.precision == "bfloat16"
        # Bytes are put in order faster than what they become, and stacked faster than copied.
        last = torch.channels_last
        if not obs.is_contiguous(memory_format=last):
            obs = torch.stack(obs.unbind(1), -1).movedim(-1, 1)
        # Half precision has room for each of 256 values; the first layer divides them.
        kind = torch.bfloat16 if half else next(self.parameters()).dtype
        pixels = obs.to(kind, memory_format=last)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=half):
            features: Tensor = self.linear(self.convolutions(pixels))
        return features.float() if half else features
