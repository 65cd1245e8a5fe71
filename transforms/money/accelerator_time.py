"""Accelerator time: spreads an engine's seconds over the ledger lines of the shard that took them.

Part of *commit*, where both a shard's ledger and its engine counters are at hand. A line's share is proportional to the
tokens computed for it: uncached prompt tokens and answer tokens.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from moebeam.schemas.arrow import list_values, replace_column

PHASES = ("plan_s", "extend_s", "sample_s", "retire_s")
"""Counters of an in-process engine whose sum is the time for which it held its device."""

NUM_PROMPTS = "num_prompts"


def engine_seconds(counters: Mapping[str, float]) -> float | None:
    """Seconds that an engine was at work; None if it does not count them."""
    if not all(phase in counters for phase in PHASES):
        return None
    return float(sum(counters[phase] for phase in PHASES))


def with_accelerator_seconds(ledger: pa.Table, counters: Mapping[str, float] | None) -> pa.Table:
    """A shard's ledger with `accelerator_s` filled in; the column adds up to the engine's seconds.

    Stays null if the engine does not count, or counted other prompts than this shard's: then another shard of the same
    process ran at the same time, and the seconds cannot be attributed.
    """
    seconds = engine_seconds(counters or {})
    if seconds is None or (counters or {}).get(NUM_PROMPTS) != ledger.num_rows or ledger.num_rows == 0:
        return ledger
    weights = np.zeros(ledger.num_rows)  # (num_lines,), computed tokens
    for name in ("cache_miss_tokens", "visible_output_tokens", "reasoning_tokens"):
        weights += [count or 0 for count in list_values(ledger, name)]
    if not weights.any():
        weights += 1
    return replace_column(ledger, "accelerator_s", list(seconds * weights / weights.sum()))
