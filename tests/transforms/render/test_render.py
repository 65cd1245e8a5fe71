"""Rendering: prompts, keys and rejects, batch by batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.prefix_tree import prefix_key, token_ids_of
from moebeam.schemas.job.sections import PromptSection, SamplingSection
from moebeam.schemas.records import Message, Sampling, parse_sampling_json, sampling_json
from moebeam.schemas.tables import plan_schema, read_schema
from moebeam.transforms.render.render_rows import Renderer, RenderSpec


def render(
    checkpoint: Path, rows: list[dict[str, Any]], *, types: dict[str, pa.DataType] | None = None, **changes: Any
) -> list[dict[str, Any]]:
    types = types or {}
    spec = RenderSpec(
        **{
            "prompt": PromptSection(system="be terse", template="{{ text }}"),
            "sampling": SamplingSection(max_tokens=16),
            "checkpoint": str(checkpoint),
            "passthrough": (),
            "messages_column": None,
            **changes,
        }
    )
    names = {name for row in rows for name in row["input"]}
    fields = [pa.field(name, types.get(name, pa.string())) for name in sorted(names)]
    defaults = {"scope": "row", "num_rows": 1, "tenant": "", "passthrough": {}}
    batch = pa.RecordBatch.from_pylist([{**defaults, **row} for row in rows], schema=read_schema(fields, []))
    (rendered,) = Renderer(spec).render_rows(batch)
    assert rendered.schema == plan_schema([])
    return rendered.to_pylist()


def test_the_prompt_is_the_chat_template_of_the_rendered_messages(tiny_checkpoint: Path) -> None:
    (row,) = render(tiny_checkpoint, [{"custom_id": "a", "tenant": "t", "input": {"text": "hi"}}])
    encoder = PromptEncoder.load(str(tiny_checkpoint))
    (expected,) = encoder.encode_batch([encoder.render([Message("system", "be terse"), Message("user", "hi")])])
    assert row["prefix_key"] == prefix_key("t", expected)
    assert np.array_equal(token_ids_of(row["prefix_key"]), expected)
    assert row["num_prompt_tokens"] == len(expected)
    assert json.loads(row["messages"])[1] == {"role": "user", "content": "hi"}
    assert parse_sampling_json(row["sampling"]) == Sampling(max_tokens=16)


def test_rejects_of_read_pass_through_and_later_rows_keep_their_own_tokens(tiny_checkpoint: Path) -> None:
    rows = [
        {"custom_id": "a", "input": {"text": "first"}},
        {"custom_id": "b", "input": {"text": None}, "error_stage": "read", "error_type": "invalid_value"},
        {"custom_id": "c", "input": {"text": None}},
        {"custom_id": "d", "input": {"text": "last"}},
    ]
    rendered = render(tiny_checkpoint, rows)
    assert [row["error_type"] for row in rendered] == [None, "invalid_value", "null_value", None]
    assert [row["prefix_key"] is None for row in rendered] == [False, True, True, False]
    (alone,) = render(tiny_checkpoint, rows[3:])
    assert rendered[3]["prefix_key"] == alone["prefix_key"]


def test_a_row_of_its_own_sampling_overrides_the_job_and_is_checked(tiny_checkpoint: Path) -> None:
    chat = '[{"role": "user", "content": "hi"}]'
    rows = [
        {"custom_id": "a", "input": {"messages": chat, "sampling": '{"temperature": 0.5, "stop": ["x"]}'}},
        {"custom_id": "b", "input": {"messages": chat, "sampling": "{}"}},
        {"custom_id": "c", "input": {"messages": chat, "sampling": '{"top_p": 7}'}},
        {"custom_id": "d", "input": {"messages": chat, "sampling": '{"max_tokens": 510}'}},
    ]
    prompt = {"prompt": PromptSection(), "messages_column": "messages", "sampling_column": "sampling"}
    rendered = render(tiny_checkpoint, rows, **prompt)
    assert parse_sampling_json(rendered[0]["sampling"]) == Sampling(max_tokens=16, temperature=0.5, stop=("x",))
    assert parse_sampling_json(rendered[1]["sampling"]) == Sampling(max_tokens=16)
    assert (rendered[2]["error_type"], "top_p" in rendered[2]["error_message"]) == ("invalid_sampling", True)
    assert rendered[3]["error_type"] == "context_overflow"


def test_fields_that_only_other_rows_of_a_struct_set_are_no_data(tiny_checkpoint: Path) -> None:
    def chat(name: str, **arguments: str) -> list[dict[str, Any]]:
        calls = [{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}]
        return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]

    chats = pa.array([chat("mail", to="Eve"), chat("post", town="Oslo")])
    rows = [
        {"custom_id": name, "input": {"messages": value}} for name, value in zip("ab", chats.to_pylist(), strict=True)
    ]
    assert "town" in rows[0]["input"]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    rendered = render(
        tiny_checkpoint, rows, types={"messages": chats.type}, prompt=PromptSection(), messages_column="messages"
    )
    written = [json.loads(row["messages"])[1]["tool_calls"][0]["function"] for row in rendered]
    assert written == [
        {"name": "mail", "arguments": {"to": "Eve"}},
        {"name": "post", "arguments": {"town": "Oslo"}},
    ]


def test_equal_samplings_are_spelled_alike() -> None:
    assert sampling_json(Sampling(max_tokens=1, temperature=0.0)) == sampling_json(Sampling(1, 0, 1, (), None))
