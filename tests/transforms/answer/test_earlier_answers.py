"""An earlier run's answers, looked up by its fences."""

from pathlib import Path

import pyarrow as pa

from moebeam.schemas.arrow import encode_parquet_file
from moebeam.schemas.records import Usage
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.reuse import EarlierAnswers, ReuseSource, fences_path
from moebeam.transforms.answer.shard_tables import shard_tables
from moebeam.transforms.plan.sorted_runs import write_rows
from tests.transforms.answer.test_shard_tables import RUN, accounted, planned


def test_the_fences_of_a_run_are_read_once_for_all_its_shards(tmp_path: Path) -> None:
    source = ReuseSource(str(tmp_path / "yesterday"), "run")
    layouts = [RunLayout(str(tmp_path / name)) for name in ("today", "tomorrow")]
    fences = pa.table({"shard": ["s000000"], "first": [b"a"], "last": [b"k"]})
    for layout in layouts:
        write_rows(fences_path(layout), fences)
    first, again, other = (EarlierAnswers.load(source, layouts[index]) for index in (0, 0, 1))
    assert first is again
    assert first is not other
    assert first.fences.equals(fences)


def test_tables_of_an_older_version_are_taken_over_without_what_they_lack(tmp_path: Path) -> None:
    earlier, layout = RunLayout(str(tmp_path / "yesterday")), RunLayout(str(tmp_path / "today"))
    rows = planned([[1, 2]], [None])
    results = shard_tables("s000000", rows, {0: [accounted(0, Usage(2, 1, 0))]}, RUN)["results"]
    later = ["provider_finish_reason", "usage_status", "estimated_prompt_tokens", "estimated_completion_tokens"]
    storage.write_whole(earlier.published_file("results", "s000000"), encode_parquet_file(results.drop_columns(later)))
    write_rows(earlier.shard_plan("s000000"), rows.table)
    key = rows.values("prefix_key")[0]
    write_rows(fences_path(layout), pa.table({"shard": ["s000000"], "first": [key], "last": [key]}))
    found = EarlierAnswers.load(ReuseSource(earlier.output, "run"), layout).find_answers(rows.table, [0])
    assert (found[0].values["output_text"], found[0].values["provider_finish_reason"]) == ("answer 0", None)
    assert found[0].reused_from == "run/r0"
