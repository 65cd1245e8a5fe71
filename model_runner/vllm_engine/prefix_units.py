"""What a prefix cache of whole units can serve: vLLM's, which hits only where all caches of a model have a boundary.

A unit is a block, or for models with several kinds of caches the least common multiple of their blocks: DeepSeek V4 on
Ascend compresses 128 tokens into one, so that blocks of 128 make units of 16,384 (vllm-ascend's issues 10710, 16270).
Used by the quote before a run, and by the engine in order and account.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moebeam.model_runner.prefix_tree import prefix_key
from moebeam.schemas.canonical import Json
from moebeam.schemas.records import Request

CPU_BLOCK, GPU_BLOCK, ASCEND_V4_BLOCK = 128, 16, 32
"""Blocks that vLLM 0.32, and for V4 vllm-ascend since 0.22, take by themselves."""

V4_GPU_UNIT = 256
"""Of V4 on CUDA, ROCm and CPU in vLLM 0.32, whatever the block size."""

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PrefixUnit:
    """Where a cache can be hit.

    Attributes:
        num_tokens: between two boundaries.
        num_dropped_units: units at the end of a match that are computed anyway: 1 with draft models that read ahead.
        num_replayed_tokens: tokens before the boundary that are computed again (V4.1's sliding windows).
        block_size: of vLLM's cache; 0 if not known.
    """

    num_tokens: int
    num_dropped_units: int = 0
    num_replayed_tokens: int = 0
    block_size: int = 0

    @property
    def min_prefix_tokens(self) -> int:
        """The shortest shared prefix that can be hit."""
        return self.num_tokens * (1 + self.num_dropped_units)


@dataclass(frozen=True, slots=True)
class Reach:
    """Prompt tokens of some requests in token order.

    Attributes:
        num_tokens: all.
        num_shared: those that a perfect cache serves; h* as a count.
        num_reachable: those that a cache of whole units serves.
        longest_missed: the longest shared prefix that is too short for a hit; 0 if none.
    """

    num_tokens: int = 0
    num_shared: int = 0
    num_reachable: int = 0
    longest_missed: int = 0

    def __add__(self, other: "Reach") -> "Reach":
        return Reach(
            self.num_tokens + other.num_tokens,
            self.num_shared + other.num_shared,
            self.num_reachable + other.num_reachable,
            max(self.longest_missed, other.longest_missed),
        )


def reachable_hits(lengths: Sequence[int] | Counts, lcps: Sequence[int] | Counts, unit: PrefixUnit) -> Counts:
    """Tokens of each prompt that a cache of whole units serves if it forgets nothing: int64, shape (num_prompts,).

    In token order no earlier prompt shares more with a prompt than its predecessor does. The last token of a prompt is
    always computed, as its logits are needed.

    Args:
        lengths: tokens of each prompt, in token order.
        lcps: `common_prefix_lengths` of the same prompts.
    """
    matched = np.minimum(np.asarray(lcps, dtype=np.int64), np.asarray(lengths, dtype=np.int64) - 1)
    num_units = np.maximum(0, matched // unit.num_tokens - unit.num_dropped_units)
    return np.maximum(0, num_units * unit.num_tokens - unit.num_replayed_tokens)


def measure_reach(lengths: Sequence[int] | Counts, lcps: Sequence[int] | Counts, unit: PrefixUnit) -> Reach:
    """Sum what prompts in token order share and what of it a cache of whole units can serve."""
    shared = np.asarray(lcps, dtype=np.int64)
    missed = shared[shared < unit.min_prefix_tokens]
    return Reach(
        int(np.asarray(lengths, dtype=np.int64).sum()),
        int(shared.sum()),
        int(reachable_hits(lengths, shared, unit).sum()),
        int(missed.max()) if missed.size else 0,
    )


def predict_unit(config: Mapping[str, Json], *, block_size: int, device: str) -> PrefixUnit:
    """The unit that vLLM will have, as far as that is known before it is loaded.

    Args:
        config: the checkpoint's `config.json`.
        block_size: the job's; 0 lets vLLM decide.
        device: `auto`, or a torch device; `npu` is Ascend's.
    """
    kind = device.partition(":")[0]
    if str(config.get("model_type", "")).startswith("deepseek_v4"):
        if kind != "npu":
            return PrefixUnit(V4_GPU_UNIT, block_size=V4_GPU_UNIT)
        ratios = config.get("compress_ratios")
        given = [ratio for ratio in ratios if isinstance(ratio, int)] if isinstance(ratios, list) else []
        block = block_size or ASCEND_V4_BLOCK
        return PrefixUnit(block * max([128, *given]), block_size=block)
    block = block_size or (CPU_BLOCK if kind == "cpu" else GPU_BLOCK)
    return PrefixUnit(block, block_size=block)


def describe_reach(reach: Reach, unit: PrefixUnit) -> str:
    """What this cache can reach of what prompts share, on one line; with what to do where it misses much."""
    share = f"{_share(reach.num_reachable, reach.num_tokens)} of h* {_share(reach.num_shared, reach.num_tokens)}"
    text = f"a cache that hits every {unit.num_tokens:,} tokens can reach {share}"
    if 2 * reach.num_reachable >= reach.num_shared or not reach.longest_missed:
        return text
    advice = f"raise the shared part to {unit.min_prefix_tokens:,} tokens"
    ratio = unit.num_tokens // unit.block_size if unit.block_size else 0
    fitting = reach.longest_missed // (ratio * (1 + unit.num_dropped_units)) if ratio else 0
    # Blocks are powers of two of at least 16 tokens on every platform.
    smaller = 1 << (fitting.bit_length() - 1) if fitting >= 16 else 0
    if 0 < smaller < unit.block_size:
        advice += f" or use block_size = {smaller}"
    return f"{text}: prefixes of {reach.longest_missed:,} tokens cannot hit; {advice}"


def unit_key(request: Request, unit: PrefixUnit, adapter: str | None) -> tuple[str, bytes]:
    """What requests of one group have in common: all that each of them could take from the others' cache entries."""
    num_tokens = max(0, request.num_prompt_tokens - 1) // unit.num_tokens * unit.num_tokens
    return adapter or "", prefix_key(request.tenant, request.prompt_token_ids[:num_tokens])


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"
