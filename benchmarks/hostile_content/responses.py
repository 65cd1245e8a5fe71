"""Responses of a provider that are endless, larger than they seem, broken, elsewhere, or of values that cannot be.

`RESPONSES` maps a name to what is written to the connection of one row's request; `serve` answers all other requests as
a provider should. A server that one call disturbs goes on: the other rows must be answered.
"""

import asyncio
import contextlib
import gzip
import json
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from benchmarks.hostile_content.case import KEY_VARIABLE, HostileCase, small_job

HOSTILE = "the row that is answered with hostility"
"""The prompt of the row whose response is hostile."""

Write = Callable[[asyncio.StreamWriter, str], Awaitable[None]]
"""Writes a response, headers included, to a connection; the second argument is the server's own address."""

_MIB = 1 << 20
_ANSWER: Mapping[str, Any] = {
    "id": "answer",
    "object": "chat.completion",
    "created": 1_790_000_000,
    "model": "tiny",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "fine"}}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
}


@dataclass(frozen=True, slots=True)
class HostileResponse:
    """What one row's request gets.

    Attributes:
        mode: in which the job asks.
        is_harmless: whether the row may be answered as well as rejected.
    """

    write: Write
    mode: Literal["plain", "stream"] = "plain"
    is_harmless: bool = False


def _head(status: str = "200 OK", *lines: str, kind: str = "application/json") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"content-type: {kind}", *lines, "", ""]).encode("latin-1")


def _whole(content: bytes, *lines: str, status: str = "200 OK", kind: str = "application/json") -> Write:
    """A response with its length."""

    async def write(writer: asyncio.StreamWriter, address: str) -> None:
        writer.write(_head(status, *lines, f"content-length: {len(content)}", kind=kind) + content)

    return write


def _raw(*pieces: bytes, is_reset: bool = False) -> Write:
    """Bytes as they are, then the end of the connection."""

    async def write(writer: asyncio.StreamWriter, address: str) -> None:
        for piece in pieces:
            writer.write(piece)
        await writer.drain()
        (writer.transport.abort if is_reset else writer.close)()

    return write


def _endless(head: bytes, piece: bytes, *, pause_s: float = 0.0) -> Write:
    """A beginning, then the same bytes for ever."""

    async def write(writer: asyncio.StreamWriter, address: str) -> None:
        writer.write(head)
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return write


def _compressed(
    pieces: Callable[[], Iterator[bytes]], encoding: str, wbits: int = zlib.MAX_WBITS | 16, *, status: str = "200 OK"
) -> Write:
    """A body that is compressed in one layer, sent in chunks."""

    async def write(writer: asyncio.StreamWriter, address: str) -> None:
        writer.write(_head(status, f"content-encoding: {encoding}", "transfer-encoding: chunked"))
        deflate = zlib.compressobj(9, zlib.DEFLATED, wbits)
        for piece in pieces():
            _write_chunk(writer, deflate.compress(piece))
            await writer.drain()
        _write_chunk(writer, deflate.flush())
        writer.write(b"0\r\n\r\n")

    return write


def _write_chunk(writer: asyncio.StreamWriter, content: bytes) -> None:
    if content:
        writer.write(b"%x\r\n%b\r\n" % (len(content), content))


def _zeros(num_bytes: int) -> Iterator[bytes]:
    piece = bytes(_MIB)
    for _ in range(num_bytes // _MIB):
        yield piece


@cache
def _small_bomb() -> bytes:
    return gzip.compress(bytes(32 * _MIB))


def _redirect(status: str, path: str) -> Write:
    """A redirect to a path of this server, or to an address as it is."""

    async def write(writer: asyncio.StreamWriter, address: str) -> None:
        location = path if "://" in path else f"{address}{path}"
        writer.write(_head(status, f"location: {location}", "content-length: 0"))

    return write


def _json(**values: Any) -> Write:
    """An answer of which some fields are others."""
    return _whole(json.dumps({**_ANSWER, **values}).encode())


def _usage(figure: str) -> Write:
    """An answer whose counts are a figure, as it is spelled in JSON."""
    usage = f'{{"prompt_tokens": {figure}, "completion_tokens": {figure}, "prompt_tokens_details": '
    usage += f'{{"cached_tokens": {figure}}}, "completion_tokens_details": {{"reasoning_tokens": {figure}}}}}'
    return _whole(json.dumps({**_ANSWER, "usage": "FIGURE"}).replace('"FIGURE"', usage).encode())


def _message(**fields: Any) -> Write:
    choice = {**_ANSWER["choices"][0], "message": {"role": "assistant", "content": "fine", **fields}}
    return _json(choices=[choice])


def _choice(**fields: Any) -> Write:
    return _json(choices=[{**_ANSWER["choices"][0], **fields}])


def _call(number: int) -> dict[str, Any]:
    return {"index": number, "id": f"call {number}", "type": "function", "function": {"name": "f", "arguments": "{}"}}


_EVENTS = _head("200 OK", "connection: close", kind="text/event-stream")
_CLOSED = "connection: close"


def _event(delta: Mapping[str, Any], **choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta, **choice}]}).encode() + b"\n\n"


_DEEP = b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
_PLAIN: Mapping[str, Write] = {
    "endless_body": _endless(_head("200 OK", _CLOSED), b'{"choices": [' + b" " * _MIB),
    "endless_blank_lines": _endless(_head("200 OK", _CLOSED), b"\n" * 65_536),
    "endless_chunks": _endless(_head("200 OK", "transfer-encoding: chunked"), b"10000\r\n" + b" " * 65_536 + b"\r\n"),
    "endless_chunk_size": _endless(_head("200 OK", "transfer-encoding: chunked"), b"0" * 65_536),
    "endless_trailers": _endless(_head("200 OK", "transfer-encoding: chunked") + b"0\r\n", b"x: y\r\n" * 8_192),
    "endless_headers": _endless(b"HTTP/1.1 200 OK\r\n", b"x-h: y\r\n" * 8_192),
    "endless_header_value": _endless(b"HTTP/1.1 200 OK\r\nx-h: ", b"y" * 65_536),
    "endless_status_line": _endless(b"HTTP/1.1 200 ", b"K" * 65_536),
    "endless_interim_responses": _endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2_048),
    "endless_error_body": _endless(_head("500 Internal Server Error", _CLOSED), b'{"error": "' + b"e" * _MIB),
    "endless_refusal_body": _endless(_head("400 Bad Request", _CLOSED), b'{"error": "' + b"e" * _MIB),
    "slow_body": _endless(_head("200 OK", _CLOSED), b" ", pause_s=0.2),
    "slow_headers": _endless(b"HTTP/1.1 200 OK\r\nx-h: ", b"y", pause_s=0.2),
    "slow_error_body": _endless(_head("400 Bad Request", _CLOSED), b" ", pause_s=0.2),
    "silence_after_headers": _endless(_head("200 OK", "content-length: 1000"), b"", pause_s=1.0),
    "gzip_bomb": _compressed(lambda: _zeros(9_000 * _MIB), "gzip"),
    "deflate_bomb": _compressed(lambda: _zeros(2_000 * _MIB), "deflate", zlib.MAX_WBITS),
    "bare_deflate_bomb": _compressed(lambda: _zeros(2_000 * _MIB), "deflate", -zlib.MAX_WBITS),
    "nested_gzip_bomb": _compressed(lambda: iter([_small_bomb()]), "gzip, gzip"),
    "gzip_error_bomb": _compressed(lambda: _zeros(2_000 * _MIB), "gzip", status="500 Internal Server Error"),
    "gzip_with_more_behind": _endless(
        _head("200 OK", "content-encoding: gzip", _CLOSED) + gzip.compress(b"{}"), b"m" * 65_536
    ),
    "gzip_that_is_none": _whole(b"no gzip", "content-encoding: gzip"),
    "gzip_cut_short": _whole(gzip.compress(json.dumps(_ANSWER).encode())[:40], "content-encoding: gzip"),
    "unknown_encoding": _whole(b"\x00" * 100, "content-encoding: br"),
    "redirect_to_another_origin": _redirect("307 Temporary Redirect", "http://127.0.0.2:9/v1/chat/completions"),
    "redirect_that_drops_the_body": _redirect("302 Found", "/v1/chat/completions"),
    "redirect_in_a_loop": _redirect("308 Permanent Redirect", "/v1/chat/completions"),
    "redirect_to_no_address": _redirect("307 Temporary Redirect", "http://[::::"),
    "redirect_to_a_file": _redirect("307 Temporary Redirect", "file:///etc/passwd"),
    "redirect_without_an_address": _whole(b"", status="304 Not Modified"),
    "no_content": _raw(_head("204 No Content", _CLOSED)),
    "switching_protocols": _raw(_head("101 Switching Protocols", "upgrade: x", "connection: upgrade"), b"x" * 100),
    "html": _whole(b"<!doctype html><title>Sign in</title>" * 200, kind="text/html; charset=utf-8"),
    "unknown_charset_of_an_error": _whole(b"\xff\xfe", status="400 Bad Request", kind="application/json; charset=hex"),
    "invalid_utf8": _whole(json.dumps(_ANSWER).encode().replace(b"fine", b"\xff\xfe\xfa")),
    "lone_surrogate": _whole(json.dumps(_ANSWER).encode().replace(b'"tiny"', b'"\\ud800"')),
    "byte_order_mark": _whole(b"\xef\xbb\xbf" + json.dumps(_ANSWER).encode()),
    "utf16": _whole(json.dumps(_ANSWER).encode("utf-16")),
    "deep_json": _whole(_DEEP),
    "deep_error": _whole(b'{"error": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", status="400 Bad Request"),
    "two_answers_in_one_body": _whole(json.dumps(_ANSWER).encode() * 2),
    "length_too_long": _raw(_head("200 OK", "content-length: 100000"), json.dumps(_ANSWER).encode()),
    "length_too_short": _raw(_head("200 OK", "content-length: 20"), json.dumps(_ANSWER).encode()),
    "length_negative": _raw(_head("200 OK", "content-length: -5"), b"{}"),
    "broken_chunk": _raw(_head("200 OK", "transfer-encoding: chunked"), b"zz\r\nno\r\n"),
    "reset_in_the_body": _raw(_head("200 OK", "content-length: 5000"), b'{"choices": [', is_reset=True),
    "no_http": _raw(b"SSH-2.0-OpenSSH_9.6\r\n" * 20),
    "no_choices": _json(choices=[]),
    "choices_of_another_kind": _json(choices={"message": "fine"}),
    "ten_thousand_tool_calls": _message(content=None, tool_calls=[_call(number) for number in range(10_000)]),
    "probability_that_is_no_number": _choice(logprobs={"content": [{"token": "a", "logprob": float("nan")}]}),
    "reason_of_a_megabyte": _choice(finish_reason="r" * _MIB),
    "model_of_a_megabyte": _json(model="m" * _MIB),
    "content_of_another_kind": _message(content={"text": "fine"}),
    "wait_without_end": _whole(b"{}", "retry-after: 1e300", status="400 Bad Request"),
}

_STREAMED: Mapping[str, Write] = {
    "endless_line": _endless(_EVENTS + b'data: {"choices": "', b"x" * _MIB),
    "endless_events": _endless(_EVENTS, _event({"content": "and on "}) * 512),
    "endless_comments": _endless(_EVENTS, b": keep-alive\n\n" * 4_096),
    "slow_comments": _endless(_EVENTS, b": keep-alive\n\n", pause_s=0.2),
    "slow_pieces": _endless(_EVENTS, _event({"content": "a"}), pause_s=0.2),
    "stream_of_a_gzip_bomb": _compressed(lambda: _zeros(2_000 * _MIB), "gzip"),
    "stream_that_breaks_off": _raw(_EVENTS, _event({"content": "half of"})),
    "stream_of_an_error": _raw(_EVENTS, b'data: {"error": {"message": "no", "code": 500}}\n\n'),
    "ten_thousand_streamed_calls": _raw(
        _EVENTS, *[_event({"tool_calls": [_call(n) for n in range(10_000)]}) for _ in range(4)]
    ),
    "call_in_endless_pieces": _endless(
        _EVENTS, _event({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"a": 1}'}}]}) * 256
    ),
    "invalid_utf8_in_a_stream": _raw(
        _EVENTS, _event({"content": "fine"}, finish_reason="stop").replace(b"fine", b"\xff\xfe"), b"data: [DONE]\n\n"
    ),
}

_HARMLESS: Mapping[str, Write] = {
    "ten_thousand_choices": _json(choices=list(_ANSWER["choices"]) * 10_000),
    "repeated_keys": _whole(json.dumps(_ANSWER).encode().replace(b'"id"', b'"model": "a", "model": "b", "id"')),
    "cookies": _whole(json.dumps(_ANSWER).encode(), *[f"set-cookie: c{n}={'v' * 200}" for n in range(50)]),
    "counts_of_26_digits": _usage("9" * 26),
    "counts_of_5000_digits": _usage("9" * 5_000),
    "counts_below_zero": _usage("-1"),
    "counts_in_halves": _usage("1.5"),
    "counts_that_are_no_number": _usage("NaN"),
    "counts_that_are_infinite": _usage("1e999"),
    "counts_that_are_true": _usage("true"),
    "counts_in_objects": _usage('{"a": {"b": 1}}'),
    "counts_in_words": _usage('"twelve"'),
    "created_in_another_age": _json(created=10**18),
    "index_of_a_quintillion": _choice(index=10**18),
}

RESPONSES: Mapping[str, HostileResponse] = {
    **{name: HostileResponse(write) for name, write in _PLAIN.items()},
    **{name: HostileResponse(write, "stream") for name, write in _STREAMED.items()},
    **{name: HostileResponse(write, is_harmless=True) for name, write in _HARMLESS.items()},
}


@contextlib.contextmanager
def serve(write: Write | None) -> Generator[str]:
    """The address of a server of chat completions that answers `HOSTILE` in its own way, and all else as it should."""
    loop = asyncio.new_event_loop()
    started, stop = threading.Event(), asyncio.Event()
    addresses: list[str] = []

    async def run() -> None:
        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                async for body in _read_requests(reader):
                    is_hostile = write is not None and HOSTILE in json.dumps(body.get("messages"))
                    await (write if write is not None and is_hostile else _answer(body))(writer, addresses[0])
                    await writer.drain()
            writer.close()

        server = await asyncio.start_server(converse, "127.0.0.1", 0)
        addresses.append("http://{}:{}".format(*server.sockets[0].getsockname()))
        started.set()
        await stop.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    started.wait()
    try:
        yield f"{addresses[0]}/v1"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def _read_requests(reader: asyncio.StreamReader) -> AsyncIterator[Mapping[str, Any]]:
    """The bodies of the requests of one connection, until it ends."""
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = head.partition("content-length:")[2].partition("\r\n")[0].strip()
        yield json.loads(await reader.readexactly(int(length or 0)) or b"{}")


def _answer(body: Mapping[str, Any]) -> Write:
    """The answer that a row should get."""
    if not body.get("stream"):
        return _whole(json.dumps(_ANSWER).encode())
    usage = b"data: " + json.dumps({"choices": [], "usage": _ANSWER["usage"]}).encode() + b"\n\n"
    content = _event({"content": "fine"}, finish_reason="stop") + usage + b"data: [DONE]\n\n"
    return _whole(content, kind="text/event-stream")


def _case(name: str, response: HostileResponse | None) -> HostileCase:
    rows = [{"id": f"row {row}", "text": HOSTILE if row == 2 else f"ticket {row}"} for row in range(5)]

    @contextlib.contextmanager
    def prepare(folder: Path) -> Generator[Path]:
        with serve(None if response is None else response.write) as base_url:
            model = {
                "engine": "openai",
                "name": "tiny",
                "provider": "vllm",
                "base_url": base_url,
                "api_key_variable": KEY_VARIABLE,
                "mode": "plain" if response is None else response.mode,
                "timeout_s": 1.0,
                "max_answer_s": 3.0,
                "max_retries": 1,
            }
            with small_job(folder, rows, model=model) as job_file:
                yield job_file

    others = frozenset(str(row["id"]) for row in rows if response is None or row["text"] != HOSTILE)
    return HostileCase(name, prepare, others, is_harmless=response is None or response.is_harmless)


ORDINARY = _case("ordinary", None)
CASES: tuple[HostileCase, ...] = tuple(_case(name, response) for name, response in RESPONSES.items())
