"""The plan's record: a run's shards and their sizes.

Written by *plan* once the plan is complete. Free of Beam, because status, quote and resume read it too.
"""

from dataclasses import dataclass

from moebeam.schemas.store.record_json import read_record
from moebeam.schemas.store.run_layout import RunLayout


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard on the store. Requests merged into another count as rows, not as requests.

    Attributes:
        num_rows: planned rows: one an answer, or a reject.
        num_further_samples: those beyond the first of their row of the input.
    """

    shard: str
    num_rows: int
    num_requests: int
    num_rejects: int
    num_prompt_tokens: int
    num_tree_tokens: int
    num_further_samples: int = 0


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """`plan.json`: says that the plan is complete, and lists its shards in order."""

    shards: tuple[PlannedShard, ...]

    @property
    def num_rows(self) -> int:
        """Answers and rejects that the run is to have."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_further_samples(self) -> int:
        """Those beyond the first of their row of the input."""
        return sum(shard.num_further_samples for shard in self.shards)

    @property
    def max_hit_rate(self) -> float:
        """h*: the largest share of prompt tokens that a cache could serve with these shards."""
        num_tokens = sum(shard.num_prompt_tokens for shard in self.shards)
        return 1 - sum(shard.num_tree_tokens for shard in self.shards) / num_tokens if num_tokens else 0.0


def read_plan(layout: RunLayout) -> PlanRecord | None:
    """A run's complete plan; None if planning has not finished.

    Raises:
        CommitError: the record exists but cannot be read.
    """
    return read_record(layout.plan_record, PlanRecord, "the record of a plan")
