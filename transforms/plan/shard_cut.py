"""Cuts rows in token order into shards: estimates each row's cost and finds the most even cut within the limits.

Part of *plan*, after the rows of all runs are in one order, so that a prefix counts once whoever shares it; a quote's
survey cuts the same way. Free of Beam and of files.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt

import numpy as np
import numpy.typing as npt

from moebeam.schemas.job.sections import PlanSection

MAX_SHARD_BYTES = 256 << 20
"""Most bytes of planned rows in a shard, whatever the job allows in tokens and rows: *answer* holds them in memory."""

USUAL_OUTPUT_TOKENS = 256
"""Up to here a request is expected to use all of its `max_tokens`."""

_SCALE = 1000
"""Steps into which the limits are divided to even out shards."""

Ints = npt.NDArray[np.int64]


def estimate_output_tokens(max_tokens: int) -> int:
    """Expected output tokens of a request, reasoning included, given its `max_tokens`.

    All of them up to `USUAL_OUTPUT_TOKENS`. Above, an answer may end anywhere between there and `max_tokens`; the
    geometric mean of both is the guess with the smallest worst-case ratio to the truth.
    """
    return min(max_tokens, isqrt(USUAL_OUTPUT_TOKENS * max_tokens))


@dataclass(frozen=True, slots=True)
class RowCosts:
    """What each row in token order adds to its shard; arrays of shape (num_rows,).

    Attributes:
        tokens: prompt tokens not shared with the previous request, plus expected output; 0 if nothing is asked.
        shared_tokens: tokens shared with the previous request, which a shard that begins here pays too.
        num_rows: rows that it stands for.
        num_bytes: their bytes in the plan.
        can_begin: whether a shard may begin here; a row that another answers stays with that one.
    """

    tokens: Ints
    shared_tokens: Ints
    num_rows: Ints
    num_bytes: Ints
    can_begin: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Limits:
    """Most that a shard may add up to, without the path that it begins with; `tokens_and_path` includes that path."""

    tokens: int
    num_rows: int
    num_bytes: int
    tokens_and_path: int | None = None


class _Cutter:
    """Cuts groups of rows that stay together; prefix sums are lists, which bisect searches fastest."""

    def __init__(self, costs: RowCosts) -> None:
        can_begin = costs.can_begin.copy()
        can_begin[:1] = True
        self.starts: list[int] = np.flatnonzero(can_begin).tolist()
        self._shared: list[int] = costs.shared_tokens[self.starts].tolist()
        self._tokens, self._rows, self._bytes = (
            [0, *accumulate(np.add.reduceat(values, self.starts).tolist())] if self.starts else [0]
            for values in (costs.tokens, costs.num_rows, costs.num_bytes)
        )

    @property
    def longest_path(self) -> int:
        return max(self._shared, default=0)

    def cut(self, limits: _Limits, most_shards: int | None = None) -> list[int] | None:
        """The groups that shards begin with if each takes all it may; None if that makes more than `most_shards`.

        A shard that begins later never has to end earlier, so no cut within the limits has fewer shards.
        """
        begins: list[int] = []
        first = 0
        while first < len(self.starts):
            if len(begins) == most_shards:
                return None
            begins.append(first)
            tokens = limits.tokens
            if limits.tokens_and_path is not None:
                tokens = min(tokens, limits.tokens_and_path - self._shared[first])
            end = min(
                bisect_right(self._tokens, self._tokens[first] + tokens, first),
                bisect_right(self._rows, self._rows[first] + limits.num_rows, first),
                bisect_right(self._bytes, self._bytes[first] + limits.num_bytes, first),
            )
            # The sums at `end - 1` are still within the limits; a single group may exceed them.
            first = max(first + 1, end - 1)
        return begins


def cut_rows(costs: RowCosts, section: PlanSection) -> list[int]:
    """Cut rows in token order into contiguous shards within the job's limits, as few and then as even as possible.

    `max_shard_tokens` excludes the path that a shard begins with, which every cut repeats: if it counted, limits near
    the length of a prompt would give each request its own shard and repeat the path as often. Evenness is measured with
    that path. Only rows that cannot be cut apart may exceed a limit, in a shard of their own.

    Returns:
        The first row of each shard, in order, beginning with 0; empty without rows.
    """
    cutter = _Cutter(costs)
    limits = _Limits(section.max_shard_tokens, section.max_shard_rows, MAX_SHARD_BYTES)
    best = cutter.cut(limits) or []
    num_shards = len(best)
    # With the path counted, limits scaled by `high` still allow the cut already found.
    low, high = 0, _SCALE + -(-_SCALE * cutter.longest_path // limits.tokens)
    while high - low > 1:
        share = (low + high) // 2
        tokens, rows, size = (limit * share // _SCALE for limit in (limits.tokens, limits.num_rows, limits.num_bytes))
        scaled = _Limits(limits.tokens, min(rows, limits.num_rows), min(size, limits.num_bytes), tokens_and_path=tokens)
        found = cutter.cut(scaled, most_shards=num_shards)
        if found is None:
            low = share
        else:
            best, high = found, share
    return [cutter.starts[group] for group in best]
