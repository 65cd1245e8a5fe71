"""The benchmark of tool calls: what it counts, what it refuses, and that it sees a difference."""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import toolcalls
from moebeam.model_runner.encoding.chat.answers import ParsedAnswer
from moebeam.model_runner.encoding.deepseek.deepseek_v4 import DeepSeekV4
from moebeam.schemas.records import ToolCall

TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}


def run(folder: Path, *lines: str) -> tuple[int, dict[str, Any]]:
    (folder / "cases.jsonl").write_text("\n".join(lines), encoding="utf-8")
    code = toolcalls.main(["--cases", str(folder / "cases.jsonl"), "--json", str(folder / "out.json")])
    report = folder / "out.json"
    return code, json.loads(report.read_text()) if report.exists() else {}


def case(*calls: dict[str, Any]) -> str:
    return json.dumps({"tools": [TOOL], "calls": list(calls)})


def test_made_cases_are_equal_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    made = tmp_path / "made.jsonl"
    for _ in range(2):
        before = made.read_bytes() if made.exists() else None
        assert toolcalls.main(["--make", str(made), "--num-cases", "300", "--seed", "7"]) == 0
        assert before in (None, made.read_bytes())
    assert "｜DSML｜" in made.read_text(encoding="utf-8")
    code, report = run(tmp_path, *made.read_text(encoding="utf-8").split("\n"))
    assert (code, report["num_cases"], report["num_equal"], report["failures"]) == (0, 300, 300, [])
    assert 0 < report["num_valid_before"] == report["num_valid_after"] < report["num_validated"]
    assert report["num_validity_agreements"] == report["num_validated"]


def test_both_forms_of_calls_are_read(tmp_path: Path) -> None:
    nested = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"n": "1"}'}}
    code, report = run(tmp_path, case(nested, {"name": "f", "arguments": {"n": 1}}), "", case())
    assert (code, report["num_cases"], report["num_calls"], report["num_valid_before"]) == (0, 2, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [('{"a": 1, "a": 2}', "twice"), ("[1]", "expected a JSON object"), ('{"a": NaN}', "NaN"), ("", "arguments")],
)
def test_what_cannot_be_written_counts_as_refused(tmp_path: Path, arguments: str, reason: str) -> None:
    code, report = run(tmp_path, case(), case({"name": "f", "arguments": arguments}))
    assert (code, report["num_refused"], report["num_equal"]) == (1, 1, 1)
    assert report["failures"][0]["line"] == 2
    assert reason in report["failures"][0]["reason"]


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ((), "expected 1 calls, found 0"),
        ((ToolCall("", "g", '{"n": 1}'),), "calls[0].name"),
        ((ToolCall("", "f", '{"n": 1.0}'),), "calls[0].arguments"),
        ((ToolCall("", "f", '{"n": true}'),), "calls[0].arguments"),
    ],
)
def test_differences_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: tuple[ToolCall, ...], reason: str
) -> None:
    monkeypatch.setattr(DeepSeekV4, "parse", lambda *_, **__: ParsedAnswer("", tool_calls=calls))
    code, report = run(tmp_path, case({"name": "f", "arguments": {"n": 1}}))
    assert (code, report["num_equal"]) == (1, 0)
    assert report["failures"][0]["reason"].startswith(reason)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "expected JSON"),
        ("[]", "expected an object with `tools` and `calls`"),
        ('{"tools": []}', "calls: expected a list"),
        ('{"tools": 1, "calls": []}', "tools: expected a list"),
        ('{"calls": [1]}', "calls[0]: expected a call"),
        ('{"calls": [{"name": "f"}]}', "calls[0].arguments: expected an object or its text"),
        ('{"calls": [{"name": "f", "arguments": {"a": 1, "a": 2}}]}', "every key once"),
    ],
)
def test_bad_input_names_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, found: str
) -> None:
    assert run(tmp_path, case(), line) == (2, {})
    message = capsys.readouterr().err
    assert "cases.jsonl:2: " in message
    assert found in message


def test_missing_file_is_bad_input(tmp_path: Path) -> None:
    assert toolcalls.main(["--cases", str(tmp_path / "none"), "--json", str(tmp_path / "out")]) == 2
