"""Rotary position embedding: frequencies from a configuration, and the rotations that the architectures use."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Rotary:
    """Cosines and sines of positions: `num_pairs` angles for each."""

    def __init__(self, inverse_frequencies: Tensor, scaling: float, device: torch.device) -> None:
        self._inverse_frequencies = inverse_frequencies.float().to(device)
        self._scaling = scaling

    @classmethod
    def from_config(
        cls, config: Any, parameters: Mapping[str, Any], width: int, device: torch.device, label: str | None = None
    ) -> "Rotary":
        """Compute the frequencies that a `transformers` configuration asks for.

        Args:
            parameters: `rope_type`, `rope_theta` and what that type needs.
            width: rotated elements of a head.
            label: the key of `parameters` in `config.rope_parameters`, if that holds several.
        """
        kind = str(parameters.get("rope_type", "default"))
        if kind == "default":
            exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
            return cls(1.0 / (float(parameters["rope_theta"]) ** exponents), 1.0, device)
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # seconds, and few models need it

        named: dict[str, Any] = {} if label is None else {"layer_type": label}
        found, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **named)
        return cls(found, float(scaling), device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each float32 of shape (num_positions, num_pairs)."""
        angles = positions.float().unsqueeze(-1) * self._inverse_frequencies
        return angles.cos().mul_(self._scaling), angles.sin().mul_(self._scaling)


def rotate_pairs(part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbours (x0, x1), (x2, x3), ...; elements keep their indices.

    Args:
        part: shape (num_rows, ..., 2 * num_pairs).
        cos, sin: float32, shape (num_rows, num_pairs).
    Returns:
        float32, the shape of `part`.
    """
    cos, sin = _spread(cos, part), _spread(sin, part)
    pairs = part.float().contiguous().unflatten(-1, (-1, 2))
    if part.device.type == "cpu":
        # One pass instead of the seven products below; not every accelerator has complex numbers.
        rotated = torch.view_as_complex(pairs) * torch.complex(cos, sin)
        return torch.view_as_real(rotated).flatten(-2)
    first, second = pairs[..., 0], pairs[..., 1]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


def rotate_halves(part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate element `i` of the first half with element `i` of the second, as Llama does."""
    cos, sin = _spread(cos, part), _spread(sin, part)
    first, second = part.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _spread(angles: Tensor, part: Tensor) -> Tensor:
    """Insert dimensions between rows and elements, so that angles broadcast over `part`."""
    return angles.view(angles.shape[0], *([1] * (part.dim() - 2)), angles.shape[1])
