"""OpenAI batch files of a run: whole, exact, one line a row, read by the types of the `openai` package."""

import json
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from openai.types.chat import ChatCompletion

from moebeam.jobs.check.reuse import prepare_reuse
from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.output import batch_export
from moebeam.jobs.run.launch import launch
from moebeam.schemas.store import storage
from tests.support.jobs.jobs_for_tests import fake_job, priced, run_fake_job, write_script

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "required": ["category"]}}}
OTHER_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "required": ["no"]}}}

SCRIPT = {
    "default": {"text": "fine\u2028and \u0085 \u201cexact\u201d \U0001f600"},
    "rules": [
        {"contains": "call", "text": "", "tool_calls": [{"name": "weather", "arguments": {"city": "K\u00f6ln"}}]},
        {"contains": "think", "reasoning_content": "let me see", "text": "so"},
        {"contains": "unknown", "text": "who knows", "cached_tokens": None},
        {"contains": "fail", "failure": "engine_failed"},
        {"contains": "refuse", "failure": "refused", "message": "not this"},
        {"contains": "mended", "attempt": 1, "text": "no json"},
        {"contains": "not accepted", "text": '{"category": "mended"}'},
        {"contains": "never", "text": "no json"},
        {"contains": "mixed", "sample": 1, "failure": "refused", "message": "not this"},
        {"contains": "mixed", "sample": 3, "failure": "engine_failed", "message": "broke"},
    ],
}


def line(custom_id: str, content: str, **body: Any) -> str:
    messages = [{"role": "user", "content": content}]
    url = body.pop("url", "/v1/chat/completions")
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": {"messages": messages, **body}})


LINES = [
    *(line(f"plain-{row}", f"please say {row}") for row in range(40)),
    line("twin-1", "the very same"),
    line("twin-2", "the very same"),
    line("twin-3", "the very same"),
    line("failed-twin-1", "fail the same"),
    line("failed-twin-2", "fail the same"),
    line("called", "call a tool", tools=[TOOL]),
    line("thought", "think first", thinking={"type": "enabled"}),
    line("unknown", "unknown hits"),
    line("short", "say much", max_tokens=2),
    line("failed", "fail once"),
    line("refused", "refuse this"),
    line("mended", "mended answer", response_format=SCHEMA),
    line("never", "never json", response_format=OTHER_SCHEMA),
    line("many", "say", n=2),
    line("mixed", "mixed", n=4, temperature=1),
    line("embedding", "say", url="/v1/embeddings"),
    "{broken",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batch")


def sections(folder: Path, **more: Any) -> dict[str, Any]:
    script = write_script(folder / "script.json", SCRIPT)
    return {
        "model": {"script": str(script)},
        "plan": {"max_shard_rows": 12},
        "accounting": priced(folder),
        "repair": {"max_attempts": 2},
        **more,
    }


@pytest.fixture(scope="module")
def output(folder: Path, tiny_checkpoint: Path) -> Path:
    source = folder / "in.jsonl"
    source.write_text("\n".join(LINES) + "\n")
    run_fake_job(source, folder / "out", tiny_checkpoint, **sections(folder, prompt={"template": None}))
    return folder / "out"


def export(output: Path, target: Path | str, *options: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    assert run_command(["export", str(output), "--openai-batch", str(target), "--quiet", *options]) == 0
    return read(target, "output.jsonl"), read(target, "error.jsonl")


def read(target: Path | str, name: str) -> list[dict[str, Any]]:
    content = storage.read_bytes(storage.join(str(target), name)).decode()
    lines = content.splitlines()
    assert lines == content.split("\n")[:-1], "every reader finds the same lines"
    return [json.loads(line) for line in lines]


def by_id(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {found["custom_id"]: found for found in lines}


def table(output: Path, name: str) -> list[dict[str, Any]]:
    files = sorted((output / name).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_every_custom_id_occurs_exactly_once_in_the_order_of_the_tables(output: Path, tmp_path: Path) -> None:
    answers, errors = export(output, tmp_path)
    wanted = [json.loads(text)["custom_id"] for text in LINES[:-1]] + [f"in.jsonl:{len(LINES) - 1}"]
    both = ["mixed"]  # some of its samples were answered
    assert Counter(found["custom_id"] for found in answers + errors) == Counter(wanted + both)
    for lines, name in ((answers, "results"), (errors, "rejects")):
        ids = dict.fromkeys(row["custom_id"] for row in table(output, name))
        assert [found["custom_id"] for found in lines] == [*ids]
    for name in ("id", "custom_id"):
        assert len({found[name] for found in answers + errors}) == len(wanted)


def test_samples_of_a_row_are_choices_of_one_line(output: Path, tmp_path: Path) -> None:
    answers, errors = (by_id(lines) for lines in export(output, tmp_path))
    many, mixed = (answers[name]["response"]["body"] for name in ("many", "mixed"))
    assert [choice["index"] for choice in many["choices"]] == [0, 1]
    assert [choice["index"] for choice in mixed["choices"]] == [0, 2]
    assert errors["mixed"]["id"] == answers["mixed"]["id"]
    assert errors["mixed"]["error"] == {"code": "refused", "message": "sample 1: not this; sample 3: broke"}
    rows = [row for row in table(output, "results") if row["custom_id"] == "mixed"]
    assert [row["sample"] for row in rows] == [0, 2]
    assert mixed["usage"]["completion_tokens"] == sum(row["completion_tokens"] for row in rows)


def test_the_openai_package_reads_every_answer_as_the_run_kept_it(output: Path, tmp_path: Path) -> None:
    answers, errors = export(output, tmp_path)
    rows = {row["custom_id"]: row for name in ("results", "rejects") for row in table(output, name)}
    num_bodies = 0
    for found in answers + errors:
        response, row = found["response"], rows[found["custom_id"]]
        if response is None or response["status_code"] != 200 or found["custom_id"] in ("many", "mixed"):
            continue
        body = ChatCompletion.model_validate_json(json.dumps(response["body"]), strict=True)
        message = body.choices[0].message
        assert (message.content or "", body.choices[0].finish_reason) == (row["output_text"], row["finish_reason"])
        assert body.model == "tiny" and body.system_fingerprint == row["model_revision"]
        assert body.usage is not None and body.usage.prompt_tokens == row["prompt_tokens"]
        num_bodies += 1
    assert num_bodies == len(answers) - 1
    assert all(found["error"] is None and found["response"]["status_code"] == 200 for found in answers)


def test_calls_reasoning_and_cut_answers_stand_where_clients_look(output: Path, tmp_path: Path) -> None:
    answers, _ = export(output, tmp_path)
    body = {custom_id: found["response"]["body"] for custom_id, found in by_id(answers).items()}
    called = ChatCompletion.model_validate(body["called"]).choices[0]
    assert (called.finish_reason, called.message.content) == ("tool_calls", None)
    assert called.message.tool_calls is not None
    (call,) = called.message.tool_calls
    assert call.type == "function" and json.loads(call.function.arguments) == {"city": "Köln"}
    thought = body["thought"]["choices"][0]["message"]
    assert (thought["reasoning_content"], thought["content"]) == ("let me see", "so")
    assert body["thought"]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    assert "reasoning_content" not in body["plain-0"]["choices"][0]["message"]
    assert "tool_calls" not in body["plain-0"]["choices"][0]["message"]
    assert body["short"]["choices"][0]["finish_reason"] == "length"
    assert body["plain-0"]["choices"][0]["message"]["content"] == SCRIPT["default"]["text"]
    assert body["mended"]["choices"][0]["message"]["content"] == '{"category": "mended"}'


def test_merged_rows_are_answers_of_their_own_and_paid_once(output: Path, tmp_path: Path) -> None:
    answers, errors = export(output, tmp_path)
    bodies = [by_id(answers)[f"twin-{n}"]["response"]["body"] for n in (1, 2, 3)]
    assert len({body["id"] for body in bodies}) == 3
    assert len({json.dumps(body["choices"]) for body in bodies}) == 1
    assert len({body["created"] for body in bodies}) == 1 and bodies[0]["created"] > 0
    assert [body["usage"]["total_tokens"] > 0 for body in bodies] == [True, False, False]
    failed = [by_id(errors)[f"failed-twin-{n}"] for n in (1, 2)]
    assert [found["response"]["status_code"] for found in failed] == [500, 500]


def test_usage_of_both_files_adds_up_to_the_ledger(output: Path, tmp_path: Path) -> None:
    answers, errors = export(output, tmp_path)
    usages = [found["response"]["body"]["usage"] for found in answers + errors if found["response"] is not None]
    ledger = table(output, "ledger")
    assert any(entry["attempt"] == 2 for entry in ledger) and any(entry["cache_hit_tokens"] is None for entry in ledger)
    hits, misses, visible, reasoning = (
        sum(entry[f"{name}_tokens"] or 0 for entry in ledger)
        for name in ("cache_hit", "cache_miss", "visible_output", "reasoning")
    )
    assert sum(usage["prompt_tokens"] for usage in usages) == hits + misses
    assert sum((usage["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"] for usage in usages) == hits
    assert sum(usage["completion_tokens"] for usage in usages) == visible + reasoning
    assert sum(usage["completion_tokens_details"]["reasoning_tokens"] for usage in usages) == reasoning > 0
    assert sum(usage["total_tokens"] for usage in usages) == hits + misses + visible + reasoning
    assert by_id(answers)["unknown"]["response"]["body"]["usage"]["prompt_tokens_details"] is None


def test_created_is_when_the_last_attempt_was_answered(output: Path, tmp_path: Path) -> None:
    answers, _ = export(output, tmp_path)
    ledger = {entry["custom_id"]: entry for entry in table(output, "ledger") if entry["attempt"] == 2}
    started_at: datetime = ledger["mended"]["started_at"]
    created = by_id(answers)["mended"]["response"]["body"]["created"]
    assert 0 <= datetime.fromtimestamp(created + 1, UTC).timestamp() - started_at.timestamp() <= 1.0


def test_an_error_says_whether_the_model_was_asked_and_what_it_said(output: Path, tmp_path: Path) -> None:
    _, errors = export(output, tmp_path)
    found = by_id(errors)
    for custom_id, code in (("embedding", "unsupported"), (f"in.jsonl:{len(LINES) - 1}", "")):
        assert found[custom_id]["response"] is None
        assert found[custom_id]["error"]["code"].startswith(code or "invalid_id")
        assert found[custom_id]["error"]["message"]
    for custom_id, code, status in (("failed", "engine_failed", 500), ("refused", "refused", 400)):
        response, error = found[custom_id]["response"], found[custom_id]["error"]
        assert (response["status_code"], error["code"]) == (status, code)
        assert response["body"]["error"]["message"] == error["message"]
    assert found["refused"]["error"]["message"] == "not this"
    never = found["never"]
    assert (never["error"]["code"], never["response"]["status_code"]) == ("schema_violation", 200)
    assert never["response"]["body"]["choices"][0]["message"]["content"] == '{"category": "mended"}'


def test_the_same_run_gives_the_same_bytes_and_older_files_are_replaced(output: Path, tmp_path: Path) -> None:
    export(output, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {"output.jsonl", "error.jsonl"}
    (tmp_path / "output.jsonl").write_text("older")
    export(output, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_object_store_takes_the_files(output: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").store.clear()
    assert export(output, "memory://bucket/files") == export(output, tmp_path)


def test_reused_answers_are_answers_without_usage(
    output: Path, folder: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    source = folder / "again.jsonl"
    source.write_text("\n".join([*LINES[:3], line("new", "something new")]) + "\n")
    job = fake_job(source, tmp_path / "again", tiny_checkpoint, **sections(folder, prompt={"template": None}))
    launch(job, reuse=prepare_reuse(str(output)))
    answers, errors = export(tmp_path / "again", tmp_path / "files")
    assert errors == [] and [found["custom_id"] for found in answers] == ["plain-0", "plain-1", "plain-2", "new"]
    bodies = [ChatCompletion.model_validate(found["response"]["body"]) for found in answers]
    assert len({body.choices[0].message.content for body in bodies}) == 1
    assert [body.usage is not None and body.usage.total_tokens > 0 for body in bodies] == [False, False, False, True]
    assert [body.created > 0 for body in bodies] == [False, False, False, True]


def spoken(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = run_command([*args, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_an_unfinished_run_is_exported_only_when_asked_for_and_then_what_it_has(
    folder: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder / "long.jsonl"
    source.write_text("\n".join(LINES[:40]) + "\n")
    limits = {"max_cost": Decimal("0.0002")}
    more = sections(folder, prompt={"template": None}, limits=limits, plan={"max_shard_rows": 4})
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint, **more)
    assert summary.exit_code == 4 and 0 < summary.num_results < 40
    command = ("export", str(tmp_path / "out"), "--openai-batch", str(tmp_path / "files"))
    code, refusal = spoken(capsys, *command)
    assert code == 2 and "expected a finished run" in refusal["error"] and "--partial" in refusal["error"]
    assert not (tmp_path / "files").exists()
    for _ in ("with a manifest", "killed before there was one"):
        code, told = spoken(capsys, *command, "--partial")
        assert (code, told["run_status"]) == (0, "incomplete")
        assert told["num_answers"] == len(read(tmp_path / "files", "output.jsonl"))
        assert told["num_answers"] + told["num_errors"] == summary.num_answered
        assert told["num_journaled"] == summary.num_journaled == summary.num_answered - summary.num_results > 0
        (tmp_path / "out" / "manifest.json").unlink(missing_ok=True)


def test_what_is_no_run_is_refused_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = spoken(capsys, "export", str(tmp_path / "none"), "--openai-batch", str(tmp_path / "files"))
    assert code == 2 and "expected the output folder of a run" in told["error"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_nothing_but_rejects_has_an_empty_output_file(
    folder: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    source = folder / "bad.jsonl"
    source.write_text("{broken\n")
    run_fake_job(source, tmp_path / "out", tiny_checkpoint, **sections(folder, prompt={"template": None}))
    answers, errors = export(tmp_path / "out", tmp_path / "files")
    assert (answers, len(errors)) == ([], 1)


@pytest.mark.parametrize("damage", ["missing", "garbage", "other rows"])
def test_a_damaged_table_is_named_and_nothing_is_written(
    folder: Path, tmp_path: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source = folder / "few.jsonl"
    source.write_text("\n".join(LINES[:3]) + "\n")
    run_fake_job(source, tmp_path / "out", tiny_checkpoint, **sections(folder, prompt={"template": None}))
    (part,) = (tmp_path / "out" / "results").glob("*.parquet")
    if damage == "missing":
        part.unlink()
    elif damage == "garbage":
        part.write_bytes(b"no table")
    else:
        pq.write_table(pq.read_table(part).slice(1), part)
    code, told = spoken(capsys, "export", str(tmp_path / "out"), "--openai-batch", str(tmp_path / "files"))
    assert code == 2 and part.name in told["error"]
    assert list((tmp_path / "files").glob("*")) == []


@pytest.mark.parametrize("inside", ["results", "ledger/files", "_moebeam"])
def test_a_folder_that_belongs_to_the_run_is_refused(
    output: Path, inside: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told = spoken(capsys, "export", str(output), "--openai-batch", str(output / inside))
    assert code == 2 and "expected a folder outside of" in told["error"]


def test_what_fails_while_writing_is_not_blamed_on_the_tables(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*unused: object) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(batch_export, "format_line", refuse)
    code, told = spoken(capsys, "export", str(output), "--openai-batch", str(tmp_path))
    assert code == 2 and told["error"].endswith("the batch files cannot be written: no space left")
