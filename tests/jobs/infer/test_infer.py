"""`Infer` between other people's reads and writes, on Beam's local runner."""

import logging
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that, equal_to

from moebeam import Infer
from moebeam.schemas.errors import InputPatternError, JobFileError
from moebeam.schemas.store.run_layout import RunLayout

RUNNER = "FnApiRunner"
ROWS = [{"id": f"r{number}", "text": f"text {number % 2}", "group": number % 2} for number in range(4)]


def sections(output: Path, checkpoint: Path, **changed: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = {
        "prompt": {"template": "Classify: {{ text }}"},
        "output": {"path": str(output)},
        "model": {"engine": "fake", "path": str(checkpoint), "name": "tiny"},
        "sampling": {"max_tokens": 8},
    }
    return {**job, **{name: {**job.get(name, {}), **section} for name, section in changed.items()}}


class _FailOnce(beam.DoFn):
    """Passes rows on, and fails with the last row of its first bundle."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def process(self, element: Any) -> Any:
        if element.id == "r3" and not self._marker.exists():
            self._marker.touch()
            raise OSError("a worker is lost")
        yield element


def test_results_are_typed_rows_that_are_grouped_and_answered_again(tmp_path: Path, tiny_checkpoint: Path) -> None:
    first = sections(tmp_path / "first", tiny_checkpoint, input={"id_column": "id", "passthrough": ["group"]})
    second = sections(tmp_path / "second", tiny_checkpoint, prompt={"template": "Again: {{ output_text }}"})
    with beam.Pipeline(RUNNER) as pipeline:
        rows = pipeline | beam.Create([beam.Row(**row) for row in ROWS])
        answers = rows | "First" >> Infer(first)
        grouped = answers.results | beam.Map(lambda row: (row.group, row.custom_id)) | beam.GroupByKey()
        assert_that(
            grouped | beam.MapTuple(lambda key, ids: (key, sorted(ids))),
            equal_to([(0, ["r0", "r2"]), (1, ["r1", "r3"])]),
        )
        again = answers.results | "Second" >> Infer(second)
        assert_that(again.results | "Count" >> beam.combiners.Count.Globally(), equal_to([4]), label="again")
        assert_that(answers.rejects, equal_to([]), label="rejects")
        attempts = answers.ledger | "Attempts" >> beam.Map(lambda line: (line.outcome, line.started_at.micros > 0))
        assert_that(attempts, equal_to([("answered", True)] * 2), label="ledger")


def test_a_retried_bundle_and_a_second_run_change_nothing(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt ends while rows arrive; the second has them in another order; the third finds all done."""
    job, output = sections(tmp_path / "out", tiny_checkpoint), tmp_path / "out"
    stored: list[dict[str, bytes]] = []
    for attempt in range(3):
        pipeline = beam.Pipeline(RUNNER)
        rows = [beam.Row(**row) for row in (ROWS if attempt == 0 else reversed(ROWS))]
        kept = pipeline | beam.Create(rows) | beam.ParDo(_FailOnce(tmp_path / "failed"))
        _ = kept | Infer(job)
        if attempt == 0:
            with pytest.raises(Exception, match="a worker is lost"):
                pipeline.run().wait_until_finish()
            continue
        pipeline.run().wait_until_finish()
        stored.append({path.name: path.read_bytes() for path in output.glob("*/*.parquet")})
    assert stored[0] == stored[1]
    files = list(Path(RunLayout(str(output)).frames).glob("*/*.parquet"))
    assert [file.name for file in files] == ["data-00000.parquet"]


def test_a_value_of_another_type_is_its_rows_reject(tmp_path: Path, tiny_checkpoint: Path) -> None:
    schema = pa.schema([("text", pa.string()), ("size", pa.int64())])
    job = sections(tmp_path / "out", tiny_checkpoint, input={"passthrough": "all"})
    with beam.Pipeline(RUNNER) as pipeline:
        rows = pipeline | beam.Create([{"text": "a", "size": 1}, {"text": "b", "size": "large"}])
        answers = rows | Infer(job, schema=schema)
        assert_that(answers.results | beam.Map(lambda row: row.size), equal_to([1]))
        found = answers.rejects | "Errors" >> beam.Map(lambda row: (row.error_type, "'size'" in row.error_message))
        assert_that(found, equal_to([("invalid_value", True)]), label="rejects")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": {"template": "{{ missing }}"}}, r"\[prompt\] template: .* no column 'missing'"),
        ({"input": {"id_column": "ids"}}, r"\[input\] id_column: .* no column 'ids'; did you mean 'id'"),
        ({"input": {"passthrough": {"rename": {"group": "the group"}}}}, r"found 'the group'"),
    ],
)
def test_a_wrong_field_is_named_when_the_pipeline_is_built(
    tmp_path: Path, tiny_checkpoint: Path, changed: dict[str, Any], message: str
) -> None:
    rows = beam.Pipeline(RUNNER) | beam.Create([beam.Row(**row) for row in ROWS])
    with pytest.raises(JobFileError, match=message):
        _ = rows | Infer(sections(tmp_path / "out", tiny_checkpoint, **changed))
    assert not (tmp_path / "out").exists()


def test_a_table_of_the_job_is_refused_where_nothing_would_commit_to_it(tmp_path: Path, tiny_checkpoint: Path) -> None:
    job = sections(tmp_path / "out", tiny_checkpoint)
    job["output"]["table"] = f"delta://{tmp_path}/table"
    with pytest.raises(JobFileError, match=r"\[output\] table: expected none in a job of Infer, found 'delta://"):
        Infer(job)


def test_rows_without_a_schema_need_one_for_columns_that_come_back(tmp_path: Path, tiny_checkpoint: Path) -> None:
    rows = beam.Pipeline(RUNNER) | beam.Create(ROWS)
    with pytest.raises(JobFileError, match=r"\[input\] passthrough: 'group' of rows without a schema"):
        _ = rows | Infer(sections(tmp_path / "out", tiny_checkpoint, input={"passthrough": ["group"]}))


def test_an_unbounded_collection_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    rows = beam.Pipeline(RUNNER) | beam.Create(ROWS)
    rows.is_bounded = False
    with pytest.raises(InputPatternError, match="expected a bounded collection"):
        _ = rows | Infer(sections(tmp_path / "out", tiny_checkpoint))


def test_beam_yaml_runs_a_job_among_four_stages(
    tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("jsonschema")
    from apache_beam.yaml import main

    from moebeam.jobs.infer.beam_yaml import PROVIDERS

    caplog.set_level(logging.ERROR)
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(f"""
pipeline:
  transforms:
    - type: Create
      name: Rows
      config: {{elements: [{{id: a, text: hello}}, {{id: b, text: bye}}]}}
    - type: MoebeamInfer
      name: Ask
      input: Rows
      config:
        input: {{id_column: id}}
        prompt: {{template: "{{% raw %}}Say {{{{ text }}}}{{% endraw %}}"}}
        model: {{engine: fake, path: {tiny_checkpoint}, name: tiny}}
        sampling: {{max_tokens: 8}}
        output: {{path: {tmp_path}/out}}
    - type: MapToFields
      name: Ids
      input: Ask.results
      config: {{language: python, fields: {{line: custom_id}}}}
    - type: WriteToText
      input: Ids
      config: {{path: {tmp_path}/ids}}
providers:
  - include: {PROVIDERS}
""")
    main.run(["--yaml_pipeline_file", str(pipeline), "--runner", RUNNER])
    lines = [line for path in tmp_path.glob("ids*") for line in path.read_text().splitlines()]
    assert sorted(lines) == ["a", "b"]
