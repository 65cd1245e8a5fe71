"""Makes a damaged plan whole: its record from the plans of its shards, and those from the input.

Beside *plan*, for the launcher and for `moebeam repair`. A plan depends on the input and the job alone, so shards that
are answered fit the plan that is made again, if both are what they were. The record of the plan before is kept until
then and held against the new one (`build_shards.write_plan`).
"""

from moebeam.schemas.errors import CommitError, FileDamaged
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import encode_record
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.sealed_file import ARROW_END, check_sealed
from moebeam.transforms.durable.commit import list_committed_shards
from moebeam.transforms.plan.build_shards import describe_shard
from moebeam.transforms.plan.plan_record import PlanRecord, read_plan
from moebeam.transforms.plan.sorted_runs import read_rows

_SUFFIX = ".arrow"


def mend_record(layout: RunLayout) -> PlanRecord | None:
    """A run's complete plan, as `read_plan`; a damaged record is made again from the plans of the shards.

    Raises:
        FileDamaged: the record is damaged, and the plans of the shards were cleaned.
        CommitError: the record is damaged, and so is the plan of a shard.
        OSError: the store failed.
    """
    try:
        return read_plan(layout)
    except FileDamaged as damage:
        # The record was written last of all, so every shard of the plan is there, or none since they were cleaned.
        if not (names := _list_shards(layout)):
            raise
        try:
            shards = [describe_shard(shard, read_rows(layout.shard_plan(shard))) for shard in names]
        except FileDamaged as error:
            raise CommitError(
                f"{error}; its record is damaged, too ({layout.plan_record}), so that no other plan can be held "
                "against it: run the job into another output"
            ) from damage
        record = PlanRecord(tuple(shards))
        storage.write_whole(layout.plan_record, encode_record(record))
        return record


def set_plan_aside(layout: RunLayout) -> list[str]:
    """Let the next launch make the plan again, if the plan of a shard is damaged; reads all of them.

    Returns:
        Paths of the damaged ones.
    Raises:
        CommitError: the record is damaged, too.
        OSError: the store failed.
    """
    damaged = [path for shard in _list_shards(layout) if _is_damaged(path := layout.shard_plan(shard))]
    if damaged and (record := mend_record(layout)) is not None:
        if list_committed_shards(layout):
            storage.write_whole(layout.plan_before, encode_record(record))
        storage.remove_files([layout.plan_record])
    return damaged


def _is_damaged(path: str) -> bool:
    try:
        check_sealed(path, ARROW_END)
    except FileDamaged:
        return True
    return False


def _list_shards(layout: RunLayout) -> list[str]:
    """Shards whose plan is on the store, in order; their names are what *plan* and a retry give them."""
    names = storage.list_names(layout.plan, _SUFFIX)
    return sorted(name.removesuffix(_SUFFIX) for name in names if name[:1] in ("s", "x"))
