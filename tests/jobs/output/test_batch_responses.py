"""Lines of OpenAI's Batch API, from rows of the tables."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from moebeam.jobs.output.batch_responses import answer_line, error_line, format_line

ROW: dict[str, Any] = {
    **dict.fromkeys(("reasoning_content", "tool_calls", "error_type", "error_message", "error_stage", "logprobs")),
    **dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "source_row"), 0),
    "custom_id": "a",
    "output_text": "",
    "finish_reason": "stop",
    "attempts": 1,
    "model": "tiny",
    "model_revision": "",
    "merged_into": None,
    "run_id": "run",
    "source_file": "in.parquet",
    "scope": "row",
    "num_rows": 1,
}

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
ROWS = st.fixed_dictionaries(
    {
        "custom_id": TEXT,
        "output_text": TEXT,
        "reasoning_content": st.none() | TEXT,
        "logprobs": st.none() | st.lists(st.floats(max_value=0.0, allow_nan=False), max_size=3),
        "tool_calls": st.none()
        | st.lists(st.fixed_dictionaries({"id": TEXT, "name": TEXT, "arguments": TEXT}), min_size=1, max_size=2),
    }
)


@given(ROWS)
def test_any_text_goes_through_a_line_unchanged(row: dict[str, Any]) -> None:
    text = format_line(answer_line([{**ROW, **row}], {}))
    assert text.endswith("\n") and len(text.splitlines()) == 1
    assert text.encode().decode() == text
    found = json.loads(text)
    assert found["custom_id"] == row["custom_id"]
    choice = ChatCompletion.model_validate(found["response"]["body"]).choices[0]
    assert (choice.message.content or "") == row["output_text"]
    assert getattr(choice.message, "reasoning_content", None) == row["reasoning_content"]
    calls = [
        (call.id, call.function.name, call.function.arguments)
        for call in choice.message.tool_calls or ()
        if call.type == "function"
    ]
    assert calls == [(call["id"], call["name"], call["arguments"]) for call in row["tool_calls"] or ()]
    if row["logprobs"] is not None:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        wanted = [-9999.0 if logprob == float("-inf") else logprob for logprob in row["logprobs"]]
        assert [token.logprob for token in choice.logprobs.content] == wanted


@pytest.mark.parametrize(("num_rows", "told"), [(70, "stands for 70 rows"), (None, "an unknown number of rows")])
def test_a_file_that_cannot_be_read_is_one_error_that_says_for_how_many_rows(num_rows: int | None, told: str) -> None:
    row = {**ROW, "attempts": 0, "scope": "file", "num_rows": num_rows, "error_type": "unreadable_file"}
    found = error_line([{**row, "error_message": "in.parquet: no Parquet", "error_stage": "read"}], {})
    assert found["response"] is None
    assert found["error"]["message"].startswith("in.parquet: no Parquet") and told in found["error"]["message"]


def test_an_interrupted_answer_has_the_status_of_a_provider_that_gave_up() -> None:
    row = {**ROW, "finish_reason": "insufficient_system_resource", "error_type": "answer_interrupted"}
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    response = error_line([{**row, **usage, "error_stage": "validate", "error_message": "gave up"}], {})["response"]
    assert response["status_code"] == 503 and response["body"]["usage"]["total_tokens"] == 7


def test_repeated_ids_get_lines_of_their_own() -> None:
    duplicate = {**ROW, "source_row": 9, "attempts": 0, "error_type": "duplicate_id", "error_stage": "plan"}
    first, second = answer_line([ROW], {}), error_line([{**duplicate, "error_message": "again"}], {})
    assert first["custom_id"] == second["custom_id"] and first["id"] != second["id"]


def test_an_exported_line_has_the_likely_tokens_of_the_table() -> None:
    row = dict.fromkeys(("reasoning_content", "tool_calls", "model_revision", "merged_into", "cached_tokens"))
    row |= {"run_id": "r", "source_file": "f", "source_row": 1, "scope": "row", "custom_id": "a", "model": "m"}
    row |= {"output_text": "yes", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1}
    row |= {"reasoning_tokens": 0, "logprobs": [-0.5], "top_logprobs": [[{"token": "yes", "logprob": float("-inf")}]]}
    line: Any = answer_line([row], {})
    (place,) = line["response"]["body"]["choices"][0]["logprobs"]["content"]
    assert place["logprob"] == -0.5
    assert place["top_logprobs"] == [{"token": "yes", "bytes": None, "logprob": -9999.0}]
