"""What an answer holds, from the job file to the tables: repair, typed output, tools, thinking, rows' own options."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from moebeam.schemas.errors import JobFileError
from tests.support.jobs.jobs_for_tests import column, priced, read_table, run_fake_job, write_parquet, write_script

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"category": {"type": "string"}, "score": {"type": "integer"}},
    "required": ["category"],
}


def write_batch(path: Path, bodies: list[dict[str, Any]]) -> Path:
    lines = [
        {
            "custom_id": f"r{row}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": f"question {row}"}], **body},
        }
        for row, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(tmp_path: Path, checkpoint: Path, source: Path, script: dict[str, Any], **sections: Any) -> Any:
    written = write_script(tmp_path / "script.json", script)
    return run_fake_job(source, tmp_path / "out", checkpoint, model={"script": str(written)}, **sections)


def test_a_wrong_answer_is_asked_again_and_both_attempts_are_paid(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["good", "bad once"]})
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    rules = [
        {"contains": "bad once", "attempt": 1, "text": "no json"},
        {"contains": "not accepted", "text": '{"category": "mended"}'},
    ]
    script = {"default": {"text": '{"category": "fine", "score": 3}'}, "rules": rules}
    output = {"schema": str(tmp_path / "schema.json")}
    summary = run(tmp_path, tiny_checkpoint, source, script, output=output)
    results = read_table(tmp_path / "out", "results")
    assert (summary.num_results, summary.exit_code) == (2, 0)
    assert results[0]["output"] == {"category": "fine", "score": 3}
    assert (results[1]["output"], results[1]["attempts"]) == ({"category": "mended", "score": None}, 2)
    assert [failed["output_text"] for failed in results[1]["failed_attempts"]] == ["no json"]
    ledger = read_table(tmp_path / "out", "ledger")
    assert [line["attempt"] for line in ledger if line["source_row"] == 1] == [1, 2]


def test_a_reject_keeps_what_every_attempt_said(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    rules = [{"attempt": attempt, "text": f"wrong {attempt}"} for attempt in (1, 2, 3)]
    output = {"schema": str(tmp_path / "schema.json")}
    repair = {"max_attempts": 3}
    summary = run(tmp_path, tiny_checkpoint, source, {"rules": rules}, output=output, repair=repair)
    assert summary.exit_code == 3
    (reject,) = read_table(tmp_path / "out", "rejects")
    assert (reject["error_type"], reject["attempts"], reject["output"]) == ("not_json", 3, None)
    said = [(failed["attempt"], failed["output_text"]) for failed in reject["failed_attempts"]]
    assert said == [(1, "wrong 1"), (2, "wrong 2"), (3, "wrong 3")]
    assert len(read_table(tmp_path / "out", "ledger")) == 3


def test_the_typed_column_is_there_when_no_row_has_an_answer(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    run(
        tmp_path,
        tiny_checkpoint,
        source,
        {"default": {"text": "no"}},
        output={"schema": str(tmp_path / "schema.json")},
        repair={"max_attempts": 1},
    )
    types = [pq.read_table(tmp_path / "out" / name).schema.field("output").type for name in ("results", "rejects")]
    assert types[0] == types[1]
    assert [field.name for field in types[0]] == ["category", "score"]


def test_tools_of_the_job_are_called_and_checked(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["good", "wrong city", "unknown"]})
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    rules = [
        {"contains": "good", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]},
        {"contains": "wrong city", "tool_calls": [{"name": "weather", "arguments": {"city": 5}}]},
        {"contains": "unknown", "tool_calls": [{"name": "wether", "arguments": {}}]},
    ]
    summary = run(
        tmp_path,
        tiny_checkpoint,
        source,
        {"rules": rules},
        tools={"path": str(tmp_path / "tools.json"), "choice": "required"},
        repair={"max_attempts": 1},
    )
    assert summary.rejects_by_type == {"tool_arguments_invalid": 2}
    (result,) = read_table(tmp_path / "out", "results")
    assert result["finish_reason"] == "tool_calls"
    assert result["tool_calls"] == [{"id": "call_0", "name": "weather", "arguments": '{"city": "Rome"}'}]
    messages = column(read_table(tmp_path / "out", "rejects"), "error_message")
    assert any("/city" in message for message in messages)
    assert any("expected weather, found 'wether'" in message for message in messages)


def test_rows_of_a_batch_file_bring_their_own_tools_and_formats(tmp_path: Path, tiny_checkpoint: Path) -> None:
    own_schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}
    bodies: list[dict[str, Any]] = [
        {},
        {"response_format": own_schema},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "schema": {"type": "strin"}}},
        {"tools": [WEATHER], "tool_choice": "required"},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"thinking": {"type": "sometimes"}},
    ]
    source = write_batch(tmp_path / "in.jsonl", bodies)
    rules = [{"contains": "question 2", "text": '{"a": 1}'}]
    summary = run(
        tmp_path,
        tiny_checkpoint,
        source,
        {"default": {"text": "5"}, "rules": rules},
        prompt={"template": None},
        repair={"max_attempts": 1},
    )
    results = {row["custom_id"]: row for row in read_table(tmp_path / "out", "results")}
    assert {name: row["output_json"] for name, row in results.items()} == {"r0": None, "r1": "5", "r2": '{"a": 1}'}
    rejects = {row["custom_id"]: row["error_type"] for row in read_table(tmp_path / "out", "rejects")}
    assert rejects == {
        "r3": "invalid_response_format",
        "r4": "tool_call_missing",
        "r5": "invalid_tools",
        "r6": "invalid_sampling",
    }
    assert summary.rows_in == 7


def test_equal_prompts_that_ask_for_other_forms_are_not_merged(tmp_path: Path, tiny_checkpoint: Path) -> None:
    same = {"messages": [{"role": "user", "content": "same"}]}
    bodies: list[dict[str, Any]] = [same, same, {**same, "response_format": {"type": "json_object"}}]
    source = write_batch(tmp_path / "in.jsonl", bodies)
    run(tmp_path, tiny_checkpoint, source, {"default": {"text": "{}"}}, prompt={"template": None})
    merged = {row["custom_id"]: row["merged_into"] for row in read_table(tmp_path / "out", "results")}
    assert merged == {"r0": None, "r1": "r0", "r2": None}


def test_a_column_of_tools_is_read_as_text_and_as_structs(tmp_path: Path, tiny_checkpoint: Path) -> None:
    as_text = write_parquet(tmp_path / "text.parquet", {"text": ["a", "b"], "tools": [json.dumps([WEATHER]), None]})
    script = {"default": {"tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}}
    run(tmp_path, tiny_checkpoint, as_text, script, tools={"column": "tools"}, repair={"max_attempts": 1})
    (result,) = read_table(tmp_path / "out", "results")
    assert result["tool_calls"][0]["name"] == "weather"
    (reject,) = read_table(tmp_path / "out", "rejects")
    assert reject["error_type"] == "tool_arguments_invalid"


def test_reasoning_has_its_own_column_and_count(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    reply = {"text": "answer", "reasoning_content": "because it is so"}
    run(tmp_path, tiny_checkpoint, source, {"default": reply}, sampling={"max_tokens": 64})
    (result,) = read_table(tmp_path / "out", "results")
    assert (result["output_text"], result["reasoning_content"]) == ("answer", "because it is so")
    (line,) = read_table(tmp_path / "out", "ledger")
    assert line["reasoning_tokens"] == result["reasoning_tokens"] > 0
    assert line["visible_output_tokens"] + line["reasoning_tokens"] == result["completion_tokens"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tools": {"path": "nowhere.json"}}, "expected a JSON file of tools, found no such file"),
        ({"tools": {"choice": "weather"}}, r"\[tools\] choice: expected auto, none, required or a declared tool"),
        ({"tools": {"column": "tols"}}, r"\[tools\] column: .* has no column 'tols'"),
        ({"model": {"encoding": "v5"}}, "encoding: expected one of"),
    ],
)
def test_wrong_sections_are_refused_before_anything_runs(
    tmp_path: Path, tiny_checkpoint: Path, sections: Any, message: str
) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    with pytest.raises(JobFileError if "model" not in sections else Exception, match=message):
        run_fake_job(source, tmp_path / "out", tiny_checkpoint, **sections)
    assert not (tmp_path / "out").exists()


def test_costs_of_attempts_add_up(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["first", "second", "third"]})
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    rules = [{"attempt": 1, "contains": name, "text": "no"} for name in ("first", "second")]
    script = {"default": {"text": '{"category": "x"}'}, "rules": rules}
    output = {"schema": str(tmp_path / "schema.json")}
    run(tmp_path, tiny_checkpoint, source, script, output=output, accounting=priced(tmp_path))
    rows, ledger = read_table(tmp_path / "out", "results"), read_table(tmp_path / "out", "ledger")
    assert len(ledger) == 5
    for name in ("cost", "cost_allocated"):
        total = sum(row[name] for row in rows)
        assert total == sum(line[name] for line in ledger) > 0
    assert sum(row["prompt_tokens"] for row in rows) == sum(
        line["cache_hit_tokens"] + line["cache_miss_tokens"] for line in ledger
    )
