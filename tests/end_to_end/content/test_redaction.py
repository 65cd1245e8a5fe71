"""What rows say stays in the tables: no log line, error text, manifest or note of a run repeats it."""

import json
import logging
from pathlib import Path

import pytest

from moebeam.jobs.commands.cli import run_command
from moebeam.transforms.plan.sorted_runs import read_rows
from tests.support.disturbances.disturbed_runs import tables_of
from tests.support.jobs.jobs_for_tests import priced, write_parquet, write_script

CANARY = "Wer-das-liest-ist-neugierig"


def job_file(folder: Path, checkpoint: Path, script: Path, *, on_error: str = "reject") -> Path:
    texts = [CANARY, f"fail {CANARY}", f"{CANARY} bad json", f"{CANARY} overload", "x" * 3000 + CANARY, None]
    source = write_parquet(folder / "in.parquet", {"id": [f"r{row}" for row in range(6)], "text": texts})
    schema = folder / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}))
    path = folder / f"{on_error}.toml"
    path.write_text(
        f"""
        [input]
        path = {json.dumps(str(source))}
        id_column = "id"
        [prompt]
        template = "{{{{ text }}}}"
        [output]
        path = {json.dumps(str(folder / on_error))}
        schema = {json.dumps(str(schema))}
        [model]
        engine = "fake"
        name = "tiny"
        path = {json.dumps(str(checkpoint))}
        script = {json.dumps(str(script))}
        [sampling]
        max_tokens = 64
        [failures]
        on_error = "{on_error}"
        retry_wait_s = 0.01
        [accounting]
        price_book = {json.dumps(priced(folder)["price_book"])}
        """
    )
    return path


@pytest.mark.parametrize("on_error", ["reject", "fail"])
def test_nothing_outside_of_the_tables_repeats_a_row(
    tmp_path: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    on_error: str,
) -> None:
    script = write_script(
        tmp_path / "script.json",
        {
            "default": {"text": '{"a": 1}'},
            "rules": [
                {"contains": "fail", "failure": "engine_failed"},
                {"contains": "bad json", "text": "no JSON"},
                {"contains": "overload", "failure": "engine_overloaded"},
            ],
        },
    )
    caplog.set_level(logging.DEBUG)
    code = run_command(
        ["run", str(job_file(tmp_path, tiny_checkpoint, script, on_error=on_error)), "--json", "--debug"]
    )
    assert code == (3 if on_error == "reject" else 1)
    run_command(["status", str(tmp_path / on_error)])
    run_command(["validate", str(tmp_path / f"{on_error}.toml")])
    told = capsys.readouterr()
    assert CANARY not in told.out + told.err
    assert CANARY not in caplog.text
    output = tmp_path / on_error
    assert any(CANARY in str(read_rows(str(path)).to_pydict()) for path in output.glob("_moebeam/plan/s*.arrow"))
    assert CANARY not in str(tables_of(output)["ledger"])
    others = [path for path in output.rglob("*") if path.suffix not in (".arrow", ".parquet") and path.is_file()]
    assert {"manifest.json", "job.json", "plan.json"} <= {path.name for path in others}
    assert [path for path in others if CANARY.encode() in path.read_bytes()] == []
