"""No response is larger or slower than an answer can be, none goes elsewhere, and one row's trouble is its own."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.hostile_content.responses import HOSTILE, RESPONSES, serve
from moebeam.model_runner.openai_engine.batch.batch_state import BatchPage, BatchState, read_reply
from moebeam.model_runner.openai_engine.batch.lines import BatchWindow
from moebeam.model_runner.openai_engine.transport.bounds import NUM_HIDDEN_TOKENS, bound_answer
from moebeam.model_runner.openai_engine.transport.event_lines import EventLines
from moebeam.schemas.errors import MalformedResponse
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engines.remote_engines import ask_rows, keep_limits_apart, load_engine
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep_limits_apart(monkeypatch, tmp_path)


def ask_three(base_url: str, hostile: str = "", **values: object) -> dict[str, Completion]:
    """Rows 0, 1 and 2, of which the last one says what is hostile."""
    first, second, third = ask_rows(3)
    last = Request(third.request_id, third.prompt_token_ids, (Message("user", hostile or "q"),), third.sampling)
    engine = load_engine(base_url, max_retries=0, **values)
    return {one.request_id: one for one in engine.generate([first, second, last])}


@pytest.mark.parametrize(
    ("name", "error_type", "is_lost"),
    [
        ("endless_body", "response_too_large", True),
        ("gzip_bomb", "response_too_large", True),
        ("bare_deflate_bomb", "response_too_large", True),
        ("nested_gzip_bomb", "malformed_response", True),
        ("endless_line", "response_too_large", True),
        ("endless_events", "response_too_large", True),
        ("slow_body", "engine_timeout", True),
        ("slow_headers", "engine_timeout", True),
        ("endless_refusal_body", "request_refused", False),
        ("redirect_to_another_origin", "redirect_refused", False),
        ("redirect_that_drops_the_body", "redirect_refused", False),
        ("redirect_in_a_loop", "redirect_refused", False),
        ("ten_thousand_tool_calls", "malformed_response", True),
        ("ten_thousand_streamed_calls", "malformed_response", True),
        ("probability_that_is_no_number", "malformed_response", True),
        ("invalid_utf8_in_a_stream", "malformed_response", True),
        ("lone_surrogate", "malformed_response", True),
    ],
)
def test_a_hostile_response_is_a_typed_reject_of_its_row_alone(name: str, error_type: str, is_lost: bool) -> None:
    response = RESPONSES[name]
    # Bytes where they are many, seconds where they are few; the tool calls of a whole answer take 1 MB.
    most = {"max_answer_s": 0.3} if name.startswith("slow") else {"max_response_bytes": 2_000_000}
    with serve(response.write) as base_url:
        found = ask_three(base_url, HOSTILE, mode=response.mode, **most)
    assert [found[row].error for row in "01"] == [None, None]
    error = found["2"].error
    assert error is not None and error.error_type == error_type
    assert {call.error_type for call in found["2"].lost_calls} - {"canary"} == ({error_type} if is_lost else set())
    if error_type != "malformed_response":
        assert len(found["2"].lost_calls) == is_lost, "what a request brings upon itself is not asked for again"


def test_a_redirect_within_the_origin_keeps_the_request_and_one_beyond_is_named() -> None:
    def reply(call: Call) -> Reply:
        if "moved" in call.path:
            return Reply(deepseek(call.last_user_text))
        where = "/moved/chat" if call.last_user_text != "away" else "http://other.example:81/x?key=sk-0"
        return Reply(status=307, headers={"location": where})

    with FakeEndpoint(reply) as served:
        found = ask_three(served.base_url, "away")
    assert [found[row].text for row in "01"] == ["question 0", "question 1"]
    assert str(found["2"].error).startswith("vllm: HTTP 307 redirects to 'http://other.example:81/x', which base_url")


def test_an_answer_that_is_compressed_is_read_and_its_cookie_forgotten() -> None:
    content = gzip.compress(json.dumps(deepseek("fine")).encode())
    headers = {"content-encoding": "gzip", "set-cookie": "a=b"}
    with FakeEndpoint(lambda call: Reply(content, headers=headers)) as served:
        found = ask_three(served.base_url, max_concurrency=1)
        assert not any("cookie" in call.headers for call in served.calls)
    assert {one.text for one in found.values()} == {"fine"}


@given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=5))
def test_lines_are_the_same_however_they_are_cut(content: bytes, places: list[int]) -> None:
    lines, cuts = EventLines(), [0, *sorted(min(place, len(content)) for place in places), len(content)]
    found = [line for start, end in pairwise(cuts) for line in lines.feed(content[start:end])]
    assert [*found, lines.end()] == content.replace(b"\r", b"\n").split(b"\n")


def test_bounds_grow_with_what_was_asked_and_can_be_set() -> None:
    plain = bound_answer(Sampling(1_000), is_stream=False, timeout_s=600.0)
    assert plain.max_bytes == (1_000 + NUM_HIDDEN_TOKENS) * 256
    assert plain.max_s == 600.0 + (1_000 + NUM_HIDDEN_TOKENS) / 10
    likely = Sampling(1_000, logprobs=True, top_logprobs=3)
    assert bound_answer(likely, is_stream=False, timeout_s=0.0).max_bytes == plain.max_bytes * 5
    assert bound_answer(Sampling(1_000), is_stream=True, timeout_s=0.0).max_bytes == plain.max_bytes * 4
    own = bound_answer(Sampling(1), is_stream=True, timeout_s=9.0, max_bytes=7, max_s=0.5)
    assert (own.max_bytes, own.max_s) == (7, 0.5)


@pytest.mark.parametrize("figure", ["1e18", "-5", "NaN", "true", '"soon"', "[1]", "9" * 26])
def test_a_time_of_a_batch_that_cannot_be_is_unknown(figure: str) -> None:
    content = f'{{"id": "b", "status": "completed", "created_at": {figure}, "completed_at": 5}}'.encode()
    batch = read_reply(BatchState, content)
    assert (batch.created_at, batch.ended_at) == (None, 5.0)


@pytest.mark.parametrize("content", [b"<html>", b'{"data": [{"id": 5}]}', b'{"data": [{"id": "", "status": "x"}]}'])
def test_a_list_of_batches_of_another_shape_is_malformed(content: bytes) -> None:
    with pytest.raises(MalformedResponse):
        read_reply(BatchPage, content)


def test_a_line_of_a_batch_that_is_too_long_is_passed_over() -> None:
    window = BatchWindow(max_line_bytes=8)
    window.file.write(b"first\n" + b"x" * 30 + b"\nsecond\n" + b"y" * 8)
    window.file.seek(0)
    assert list(window.split_answers(window.file)) == [b"first\n", b"second\n"]
    window.file.close()
