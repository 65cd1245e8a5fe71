"""The benchmark's parts at tiny size: what they compare is the same work. No time is asserted."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import report
from benchmarks.pipeline import __main__ as pipeline
from benchmarks.pipeline.contenders import NAMES, Name, load_contender
from benchmarks.pipeline.measure import measure
from benchmarks.pipeline.prompts import BenchmarkFiles, write_files, write_prompts
from benchmarks.pipeline.stages import profile_stages, walk_stages
from moebeam.schemas.tables import OUTPUT, RESULT_SCHEMA

NUM_ROWS = 40
ROW_BYTES = 160


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkFiles:
    return write_files(tmp_path_factory.mktemp("benchmark"), num_rows=NUM_ROWS, row_bytes=ROW_BYTES)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> str:
    return str(tiny_checkpoint)


def read_results(folder: Path) -> pa.Table:
    return pq.read_table(folder).sort_by("source_row")


def test_rows_have_the_size_asked_for(files: BenchmarkFiles) -> None:
    rows = pq.read_table(files.prompts).to_pylist()
    assert {len((row["account"] + row["text"]).encode()) for row in rows} == {ROW_BYTES}
    assert len({row["text"] for row in rows}) == NUM_ROWS
    assert 1 < len({row["account"] for row in rows}) < NUM_ROWS


def test_rows_do_not_depend_on_how_many_there_are(files: BenchmarkFiles, tmp_path: Path) -> None:
    write_prompts(tmp_path / "more.parquet", num_rows=NUM_ROWS + 5, row_bytes=ROW_BYTES)
    assert pq.read_table(tmp_path / "more.parquet").slice(0, NUM_ROWS) == pq.read_table(files.prompts)


def test_prompts_are_cut_into_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.pipeline.prompts.ROW_GROUP_ROWS", 16)
    write_prompts(tmp_path / "prompts.parquet", num_rows=NUM_ROWS, row_bytes=ROW_BYTES)
    metadata = pq.read_metadata(tmp_path / "prompts.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [16, 16, 8]


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_lets_every_row_out(name: Name, files: BenchmarkFiles, checkpoint: str, tmp_path: Path) -> None:
    found = measure(name, files, tmp_path, checkpoint)
    assert found["num_rows"] == NUM_ROWS
    assert found["peak_rss_bytes"] > 10 << 20


def test_a_first_small_run_is_not_counted(files: BenchmarkFiles, checkpoint: str, tmp_path: Path) -> None:
    warm_up = write_files(tmp_path / "few", num_rows=3, row_bytes=ROW_BYTES)
    assert measure("plain_loop", files, tmp_path / "output", checkpoint, warm_up=warm_up)["num_rows"] == NUM_ROWS


def test_plain_loop_gives_the_answers_of_the_whole_way(files: BenchmarkFiles, checkpoint: str, tmp_path: Path) -> None:
    load_contender("whole_way")(files, tmp_path / "whole", checkpoint)
    load_contender("plain_loop")(files, tmp_path / "plain", checkpoint)
    whole, plain = read_results(tmp_path / "whole" / "results"), read_results(tmp_path / "plain")
    assert plain.schema == whole.schema
    assert plain.schema.names == [*RESULT_SCHEMA.names, OUTPUT]
    same = ["status", "output_text", "output_json", "finish_reason", "attempts", "prompt_tokens", "completion_tokens"]
    same.append(OUTPUT)
    assert plain.select(same) == whole.select(same)


def test_stages_called_one_by_one_give_the_tables_of_the_whole_way(
    files: BenchmarkFiles, checkpoint: str, tmp_path: Path
) -> None:
    load_contender("whole_way")(files, tmp_path / "whole", checkpoint)
    seconds = walk_stages(files, tmp_path / "stages", checkpoint)
    assert list(seconds) == ["check", "render", "read", "plan: runs", "plan: shards", "answer", "publish"]
    for table in ("results", "ledger"):
        whole, walked = (read_results(tmp_path / way / table) for way in ("whole", "stages"))
        same = [name for name in whole.column_names if name not in ("run_id", "started_at")]
        assert walked.select(same) == whole.select(same)


def test_profile_names_functions_of_moebeam_alone(files: BenchmarkFiles, checkpoint: str, tmp_path: Path) -> None:
    found = profile_stages(files, tmp_path / "output", checkpoint, num_functions=200)
    by_name = {function.name: function for function in found}
    assert len(found) == 200
    assert by_name["model_runner/encoding/prompt_encoder.py:PromptEncoder.render_batch"].num_calls == 1
    assert by_name["transforms/answer/validate.py:validate_completion"].num_calls == NUM_ROWS
    assert {name.split("/")[0] for name in by_name} <= {"schemas", "model_runner", "transforms", "pipelines", "jobs"}
    assert [function.total_s for function in found] == sorted((f.total_s for f in found), reverse=True)


def test_failed_child_raises_with_its_last_words() -> None:
    with pytest.raises(pipeline.ChildFailed, match="no disk left"):
        pipeline.run_child([sys.executable, "-c", "raise SystemExit('no disk left')"])


def test_child_is_read_by_its_last_line() -> None:
    command = [sys.executable, "-c", "print('noise'); print('{\"num_rows\": 3}')"]
    assert pipeline.run_child(command) == {"num_rows": 3}


def test_an_interpreter_without_ray_is_told_apart() -> None:
    assert not pipeline.has_ray("/nowhere/python")


def test_lost_rows_stop_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = pipeline.parse_options(["--rows", "4", "--repeats", "1"])
    run = {"num_rows": 3, "seconds": 1.0, "cpu_s": 1.0, "peak_rss_bytes": 1}
    monkeypatch.setattr(pipeline, "run_child", lambda command: run)
    with pytest.raises(pipeline.ChildFailed, match="whole_way: expected 4 rows, found 3"):
        pipeline.time_contenders(tmp_path, options, ["whole_way"])


def test_contenders_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = pipeline.parse_options(["--rows", "4", "--repeats", "3"])
    seconds = iter([5.0, 2.0, 1.0, 3.0, 4.0, 6.0])
    order: list[str] = []

    def pretend(name: str, *_: object, **__: object) -> dict[str, float]:
        order.append(name)
        return {"num_rows": 4, "seconds": next(seconds), "cpu_s": 1.0}

    monkeypatch.setattr(pipeline, "write_inputs", lambda folder, **_: folder)
    monkeypatch.setattr(pipeline, "measure_once", pretend)
    timings = pipeline.time_contenders(tmp_path, options, ["whole_way", "plain_loop"])
    assert order == ["whole_way", "plain_loop", "plain_loop", "whole_way", "whole_way", "plain_loop"]
    assert (timings["whole_way"].best_s, timings["whole_way"].median_s) == (3.0, 4.0)
    assert (timings["plain_loop"].best_s, timings["plain_loop"].median_s) == (1.0, 2.0)


@pytest.mark.parametrize(("whole_s", "verdict"), [(2.0, "met"), (2.1, "missed")])
def test_ratio_is_held_against_the_goal(whole_s: float, verdict: str) -> None:
    timings = {
        "whole_way": report.Timing(num_rows=10, best_s=whole_s, median_s=3.0, cpu_s=1.0),
        "plain_loop": report.Timing(num_rows=10, best_s=1.0, median_s=1.0, cpu_s=1.0),
    }
    (line,) = report.ratio_lines(timings)
    assert f"{whole_s:.2f} by best, 3.00 by median" in line
    assert line.endswith(f"{verdict})")


@pytest.mark.parametrize(("others_cpu_s", "is_quiet"), [(-0.1, True), (0.9, True), (1.1, False)])
def test_a_busy_machine_is_said(others_cpu_s: float, is_quiet: bool) -> None:
    line = report.others_line(others_cpu_s, 10.0, has_ray=False)
    assert line.endswith("measure again") is not is_quiet


def test_own_children_do_not_count_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = iter([100.0, 130.0])
    own = iter([1.0, 21.0])
    monkeypatch.setattr(pipeline, "machine_cpu_s", lambda: next(machine))
    monkeypatch.setattr(pipeline, "_own_cpu_s", lambda: next(own))
    assert pipeline.QuietClock().others_cpu_s() == 10.0


@pytest.mark.parametrize(("extra_mib", "verdict"), [(1024, "met"), (1025, "missed")])
def test_memory_is_held_against_the_goal(extra_mib: int, verdict: str) -> None:
    peaks = {"whole_way": [100 << 20, (100 + extra_mib) << 20], "group_batches": [1 << 20, 2 << 20]}
    lines = report.memory_lines(peaks, (20_000, 200_000))
    assert f"{extra_mib:>12,}" in lines[2]
    assert lines[-1].endswith(f"{verdict})")


def test_missing_ray_is_said_instead_of_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = report.Timing(num_rows=4, best_s=1.0, median_s=1.0, cpu_s=1.0)
    monkeypatch.setattr(pipeline, "time_contenders", lambda folder, options, names: dict.fromkeys(names, timing))
    asked = pipeline.parse_options(["--rows", "4", "--ray_python", "/nowhere/python"])
    lines, found = pipeline.run_benchmark(asked, tmp_path)
    assert any("not run: /nowhere/python has no ray[data]" in line for line in lines)
    assert "ray_data" not in found["timings"]


def test_the_measuring_parent_imports_nothing_large() -> None:
    large = "{'numpy', 'pyarrow', 'apache_beam'}"
    code = f"import sys, benchmarks.pipeline.__main__; print(sorted({large} & set(sys.modules)))"
    root = Path(pipeline.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
