"""Accelerator time: an engine's own seconds, spread over the ledger lines of the shard that took them.

Part of *commit*, where both the ledger and the engine's counters of a shard are at hand. A line's share follows the
tokens that were computed for it: prompt tokens that no cache held, and tokens of the answer.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from moebeam.schemas.arrow import values_of, with_column

PHASES = ("plan_s", "extend_s", "sample_s", "retire_s")
"""Counters of an engine in process whose sum is the time for which it held its device."""

NUM_PROMPTS = "num_prompts"


def engine_seconds(counters: Mapping[str, float]) -> float | None:
    """Seconds for which an engine was at work; None where it does not count them."""
    if not all(phase in counters for phase in PHASES):
        return None
    return float(sum(counters[phase] for phase in PHASES))


def with_accelerator_seconds(ledger: pa.Table, counters: Mapping[str, float] | None) -> pa.Table:
    """A shard's ledger with `accelerator_s` filled in; the column adds up to the engine's seconds.

    It stays null where the engine does not count, and where it counted other prompts than this shard's: then another
    shard of the same process was answered at the same time, and nobody can tell whose seconds they were.
    """
    seconds = engine_seconds(counters or {})
    if seconds is None or (counters or {}).get(NUM_PROMPTS) != ledger.num_rows or ledger.num_rows == 0:
        return ledger
    weights = np.zeros(ledger.num_rows)  # (num_lines,), computed tokens
    for name in ("cache_miss_tokens", "visible_output_tokens", "reasoning_tokens"):
        weights += [count or 0 for count in values_of(ledger, name)]
    if not weights.any():
        weights += 1
    return with_column(ledger, "accelerator_s", list(seconds * weights / weights.sum()))
