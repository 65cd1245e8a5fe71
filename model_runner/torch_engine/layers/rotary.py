"""Rotary position embedding: frequencies from a configuration, and the rotations that the architectures use.

Most models turn by the same frequencies whatever the length of a sequence. `longrope` and `dynamic` do not: a prompt
that is longer than the model was trained for turns by others, all of it, and so does every later token of its answer.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moebeam.model_runner.checkpoint.rope_settings import BY_LENGTH
from moebeam.schemas.errors import EngineLoadError

_NUM_KEPT_LENGTHS = 4096


class Rotary:
    """Cosines and sines of positions: `num_pairs` angles for each.

    Attributes:
        find_length_class: which frequencies a prompt of some number of tokens turns by: 0 for the ordinary ones, else a
            length that has them. None if all turn by the ordinary ones.
    """

    def __init__(
        self,
        inverse_frequencies: Tensor,
        scaling: float,
        device: torch.device,
        *,
        longest: int | None = None,
        find_frequencies: Callable[[int], Tensor] | None = None,
        is_one_beyond: bool = True,
    ) -> None:
        """
        Args:
            inverse_frequencies: the ordinary ones; shape (num_pairs,).
            longest: most tokens of a sequence that turns by them; None if all do.
            find_frequencies: those of a sequence of more than `longest` tokens, by its length.
            is_one_beyond: whether they are the same for all such lengths.
        """
        self._inverse_frequencies = inverse_frequencies.float().to(device)
        self._scaling = scaling
        self._longest = longest
        self._find_frequencies = find_frequencies
        self._is_one_beyond = is_one_beyond
        self.find_length_class = None if longest is None else self._find_length_class

    @classmethod
    def from_config(
        cls, config: Any, parameters: Mapping[str, Any], width: int, device: torch.device, label: str | None = None
    ) -> "Rotary":
        """Compute the frequencies that a `transformers` configuration asks for.

        Args:
            parameters: `rope_type`, `rope_theta` and what that type needs.
            width: rotated elements of a head.
            label: the key of `parameters` in `config.rope_parameters`, if that holds several.
        Raises:
            EngineLoadError: they cannot be computed, or not for heads of this width.
        """
        kind = str(parameters.get("rope_type", "default"))
        if kind == "default":
            exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
            return cls(1.0 / (float(parameters["rope_theta"]) ** exponents), 1.0, device)
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # seconds, and few models need it

        named: dict[str, Any] = {} if label is None else {"layer_type": label}
        cpu = torch.device("cpu")
        try:
            found, scaling = ROPE_INIT_FUNCTIONS[kind](config, cpu, **named)
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise EngineLoadError(
                f"config.json: rope_parameters: expected settings of rope_type {kind!r}, found {dict(parameters)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if found.shape[0] * 2 != width:
            raise EngineLoadError(
                f"config.json: rope_parameters: expected frequencies of {width // 2} rotated pairs, found "
                f"{found.shape[0]}, by {dict(parameters)}"
            )
        if kind not in BY_LENGTH:
            return cls(found, float(scaling), device)
        is_longrope = kind == "longrope"
        longest = int(parameters["original_max_position_embeddings"] if is_longrope else config.max_position_embeddings)

        @lru_cache(maxsize=_NUM_KEPT_LENGTHS)
        def find_frequencies(num_tokens: int) -> Tensor:
            # As a tensor, as `transformers` passes it, so that both round alike.
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, cpu, seq_len=torch.tensor(num_tokens))
            return frequencies.float().to(device)

        return cls(
            found,
            float(scaling),
            device,
            longest=longest,
            find_frequencies=find_frequencies,
            is_one_beyond=is_longrope,
        )

    def __call__(self, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each float32 of shape (num_positions, num_pairs).

        Args:
            positions: int64, shape (num_positions,).
            lengths: of the sequence at each position; int64, shape (num_positions,). None where all turn alike.
        """
        frequencies = self._inverse_frequencies if lengths is None else self._by_length(lengths)
        angles = positions.float().unsqueeze(-1) * frequencies
        return angles.cos().mul_(self._scaling), angles.sin().mul_(self._scaling)

    def _find_length_class(self, num_tokens: int) -> int:
        assert self._longest is not None
        if num_tokens <= self._longest:
            return 0
        return self._longest + 1 if self._is_one_beyond else num_tokens

    def _by_length(self, lengths: Tensor) -> Tensor:
        """Frequencies of rows, shape (num_rows, num_pairs)."""
        longest, find_frequencies = self._longest, self._find_frequencies
        assert longest is not None and find_frequencies is not None
        # Lengths that turn alike become one, for each distinct one costs a look-up.
        alike = lengths.clamp(longest, longest + 1 if self._is_one_beyond else None)
        distinct, places = alike.unique(return_inverse=True)
        found = [
            self._inverse_frequencies if length == longest else find_frequencies(length) for length in distinct.tolist()
        ]
        return torch.stack(found)[places]


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


def rotate_leading_halves(part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same for the first `2 * num_pairs` elements of each head; the others stay as they are."""
    num_rotated = 2 * cos.shape[-1]
    if num_rotated == part.shape[-1]:
        return rotate_halves(part, cos, sin)
    return torch.cat((rotate_halves(part[..., :num_rotated], cos, sin), part[..., num_rotated:]), dim=-1)


def _spread(angles: Tensor, part: Tensor) -> Tensor:
    """Insert dimensions between rows and elements, so that angles broadcast over `part`."""
    return angles.view(angles.shape[0], *([1] * (part.dim() - 2)), angles.shape[1])
