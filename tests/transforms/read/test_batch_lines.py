"""Lines of the OpenAI batch shape."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.errors import InvalidId, InvalidLine, InvalidSampling, RowError, UnsupportedRequest
from moebeam.transforms.read.batch_lines import parse_batch_line, read_custom_id


def line(**changes: Any) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **changes.pop("body", {})}
    return json.dumps(
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body, **changes}
    ).encode()


def test_own_sampling_values_are_kept_and_spelled_one_way() -> None:
    request = parse_batch_line(line(body={"max_completion_tokens": 5, "temperature": 0, "stop": "x", "user": "u"}))
    assert json.loads(request.sampling) == {"max_tokens": 5, "temperature": 0.0, "stop": ["x"]}
    assert json.loads(request.messages) == [{"content": "hi", "role": "user"}]


@pytest.mark.parametrize(
    ("raw", "error", "expected"),
    [
        (b"{", InvalidLine, "column 2"),
        (b"\xff", InvalidLine, "byte 0xff at position 0"),
        (b"[1]", InvalidLine, "line: "),
        (b"[" * 100_000, InvalidLine, "expected a JSON object"),
        (line(extra=1), InvalidLine, "extra"),
        (line(method="GET"), InvalidLine, "method"),
        (line(custom_id=7), InvalidId, "found 7"),
        (line(custom_id=""), InvalidId, "found ''"),
        (line(url="/v1/embeddings"), UnsupportedRequest, "/v1/embeddings"),
        (line(body={"messages": []}), InvalidLine, "body.messages"),
        (line(body={"invented": True}), UnsupportedRequest, r"body\.invented"),
        (line(body={"logit_bias": {"5": 1}}), UnsupportedRequest, r"body\.logit_bias"),
        (line(body={"temperature": 3}), InvalidSampling, r"body\.temperature: expected at most 2, found 3$"),
        (line(body={"top_p": 0}), InvalidSampling, r"body\.top_p: expected more than 0, found 0$"),
        (line(body={"frequency_penalty": -2.5}), InvalidSampling, r"body\.frequency_penalty: expected at least -2"),
        (line(body={"presence_penalty": 2.5}), InvalidSampling, r"body\.presence_penalty: expected at most 2"),
        (line(body={"top_logprobs": 21}), InvalidSampling, r"body\.top_logprobs: expected at most 20, found 21"),
        (line(body={"n": 0}), InvalidSampling, r"body\.n: expected at least 1, found 0"),
        (line(body={"frequency_penalty": "high"}), InvalidLine, r"body\.frequency_penalty"),
        (line(body={"max_tokens": "9"}), InvalidLine, r"body\.max_tokens"),
    ],
)
def test_every_wrong_line_is_a_typed_reject_that_names_the_field(
    raw: bytes, error: type[RowError], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        parse_batch_line(raw)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused_by_type(raw: bytes) -> None:
    read_custom_id(raw)
    with pytest.raises(RowError):
        parse_batch_line(raw)


def test_neutral_values_change_nothing() -> None:
    plain = parse_batch_line(line())
    assert parse_batch_line(line(body={"stream": False, "tools": None, "logit_bias": {}})) == plain
    assert parse_batch_line(line(body={"user": "u", "store": True, "metadata": {"a": "b"}})) == plain


def test_what_the_engine_decides_about_is_kept_for_it() -> None:
    sampling = {"frequency_penalty": 0.5, "presence_penalty": -1.0, "logprobs": True, "top_logprobs": 2, "n": 2}
    request = parse_batch_line(line(body={**sampling, "service_tier": "flex", "model": "other"}))
    assert json.loads(request.sampling) == sampling
    assert json.loads(request.options) == {"service_tier": "flex", "model": "other"}
    assert json.loads(parse_batch_line(line(body={"n": 1})).sampling) == {"n": 1}, "it wins over the job's"


def test_tools_and_formats_keep_the_order_of_their_keys() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    own = {"response_format": {"type": "json_schema", "schema": schema}, "reasoning_effort": "max"}
    assert json.loads(parse_batch_line(line(body=own)).options) == {**own, "model": "m"}
    assert parse_batch_line(line(body=own)).options.index('"b"') < parse_batch_line(line(body=own)).options.index('"a"')
    assert json.loads(parse_batch_line(line()).options) == {"model": "m"}


def test_a_lone_surrogate_in_a_tool_is_refused() -> None:
    raw = line(body={"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]})
    with pytest.raises(InvalidLine, match="tools and schemas"):
        parse_batch_line(raw)
