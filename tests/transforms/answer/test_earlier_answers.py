"""An earlier run's answers, looked up by its fences."""

import hashlib
from pathlib import Path

import pyarrow as pa

from moebeam.schemas.answers import ShardCommit, StagedFile, Totals
from moebeam.schemas.arrow import encode_parquet_file, replace_column
from moebeam.schemas.records import Sampling, Usage, sampling_json
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import encode_record
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.reuse import EarlierAnswers, ReuseSource, fences_path
from moebeam.transforms.answer.shard_tables import PlannedRows, shard_tables
from moebeam.transforms.durable.commit import commit_shard
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
    later += ["repaired"]
    content = encode_parquet_file(results.drop_columns(later))
    storage.write_whole(earlier.published_file("results", "s000000"), content)
    file = StagedFile("results", "staged", 1, len(content), hashlib.sha256(content).hexdigest())
    commit = ShardCommit("s000000", "run", "attempt", "then", (file,), Totals())
    storage.write_whole(earlier.shard_commit("s000000"), encode_record(commit))
    write_rows(earlier.shard_plan("s000000"), rows.table)
    key = rows.values("prefix_key")[0]
    write_rows(fences_path(layout), pa.table({"shard": ["s000000"], "first": [key], "last": [key]}))
    found = EarlierAnswers.load(ReuseSource(earlier.output, "run"), layout).find_answers(rows.table, [0])
    assert (found[0].values["output_text"], found[0].values["provider_finish_reason"]) == ("answer 0", None)
    assert found[0].reused_from == "run/r0"


def test_rows_that_are_sampled_take_each_their_own_answer_and_a_row_alone_may_take_any(tmp_path: Path) -> None:
    earlier, layout = RunLayout(str(tmp_path / "yesterday")), RunLayout(str(tmp_path / "today"))
    greedy = planned([[1, 2], [1, 2], [3]], [None] * 3).table
    hot = replace_column(greedy, "sampling", [sampling_json(Sampling(max_tokens=4, temperature=1.0))] * 3)
    rows = PlannedRows.from_table(hot)
    tables = shard_tables("s000000", rows, {row: [accounted(row, Usage(2, 1, 0))] for row in range(3)}, RUN)
    commit_shard(earlier, "run", "s000000", tables)
    write_rows(earlier.shard_plan("s000000"), hot)
    keys = rows.values("prefix_key")
    write_rows(fences_path(layout), pa.table({"shard": ["s000000"], "first": [min(keys)], "last": [max(keys)]}))
    answers = EarlierAnswers.load(ReuseSource(earlier.output, "run"), layout)

    def taken(ids: list[str], samples: list[int]) -> dict[int, str]:
        table = replace_column(replace_column(hot, "custom_id", ids), "sample", samples)
        return {row: answer.reused_from for row, answer in answers.find_answers(table, range(3)).items()}

    assert taken(["r0", "r1", "r2"], [0, 0, 0]) == {0: "run/r0", 1: "run/r1", 2: "run/r2"}
    assert taken(["r1", "moved", "moved too"], [0, 0, 0]) == {0: "run/r1", 2: "run/r2"}
    assert taken(["r0", "r0", "r2"], [0, 1, 1]) == {0: "run/r0"}, "a sample is no other one's answer"
