"""Where rows in token order are cut into shards: what a row is expected to cost, and the evenest cut under the limits.

Part of *plan*, once rows of all runs stand in one order, so that a prefix counts once whoever else has it; the survey
of a quote cuts in the same way. Knows nothing of Beam or of files.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from math import isqrt

import numpy as np
import numpy.typing as npt

from moebeam.schemas.job.sections import PlanSection

MAX_SHARD_BYTES = 256 << 20
"""Most bytes of planned rows a shard: *answer* holds them, whatever the job allows in tokens and rows."""

USUAL_OUTPUT_TOKENS = 256
"""Up to here a request is expected to use the whole of its `max_tokens`."""

_SCALE = 1000
"""Shards are made even to this part of the limits."""

Ints = npt.NDArray[np.int64]


def expected_output_tokens(max_tokens: int) -> int:
    """How many output tokens, reasoning included, a request is expected to take of those it may.

    Up to `USUAL_OUTPUT_TOKENS` all of them. Above, nothing is known of an answer but that it ends somewhere between
    there and `max_tokens`; the geometric mean of both is the guess whose largest possible ratio to the truth is least.
    """
    return min(max_tokens, isqrt(USUAL_OUTPUT_TOKENS * max_tokens))


@dataclass(frozen=True, slots=True)
class RowCosts:
    """What each row in token order adds to the shard that it is in; each array has shape (num_rows,).

    Attributes:
        tokens: prompt tokens not shared with the request before it, and expected output; 0 if nothing is asked.
        shared_tokens: what it shares with the request before it, and costs too where a shard begins with it.
        num_rows: rows that it stands for.
        num_bytes: what these take in the plan.
        can_begin: whether a shard may begin with it; a row that another answers stays with that one.
    """

    tokens: Ints
    shared_tokens: Ints
    num_rows: Ints
    num_bytes: Ints
    can_begin: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Limits:
    """Most that a shard may add up to, without the path that it begins with and, where that is asked, with it."""

    tokens: int
    num_rows: int
    num_bytes: int
    tokens_and_path: int | None = None


class _Cutter:
    """Cuts groups of rows that stay together; sums are kept as lists, which bisect searches fastest."""

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
        """Groups that shards begin with if each takes all it may; None if that makes more than `most_shards`.

        What a shard may take does not end earlier where it begins later, so no cut under the limits has fewer shards.
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
            # The sums at `end - 1` are still within the limits; a group alone may go beyond them.
            first = max(first + 1, end - 1)
        return begins


def cut_rows(costs: RowCosts, section: PlanSection) -> list[int]:
    """Cut rows in token order into contiguous shards within the job's limits, as few and then as even as can be.

    Up to `max_shard_tokens` a shard may cost, and in addition the path that it begins with, which a cut repeats: were
    that to count, limits near the length of a prompt would give each request a shard, and repeat the path as often.
    How even shards are is told with that path. Only rows that cannot be cut apart may exceed a limit, as a shard alone.

    Returns:
        The first row of each shard, in order; 0 is the first of all, and there is none without rows.
    """
    cutter = _Cutter(costs)
    limits = _Limits(section.max_shard_tokens, section.max_shard_rows, MAX_SHARD_BYTES)
    best = cutter.cut(limits) or []
    num_shards = len(best)
    # Of the limits with a path this many parts are enough for the cut that is found already.
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
