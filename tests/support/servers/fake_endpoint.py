"""A chat-completion endpoint on this machine that answers in the forms of the providers, and misbehaves as told.

`FakeEndpoint(reply)` serves from a thread of its own while it is entered; `reply` says for each call what comes back.
`python -m tests.support.servers.fake_endpoint` serves from a process of its own, for measurements.
"""

import argparse
import asyncio
import itertools
import json
import random
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Fault = Literal["none", "disconnect", "half_body", "silence"]


@dataclass(frozen=True, slots=True)
class Call:
    """One request as it arrived; `number` counts from 0, headers have lower-case names."""

    number: int
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]

    @property
    def last_user_text(self) -> str:
        return next(m["content"] for m in reversed(self.body["messages"]) if m["role"] == "user")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call gets.

    Attributes:
        body: a JSON value, or the bytes themselves.
        events: sent as server-sent events in place of `body`; a string is a line of its own, such as a comment.
        num_blank_lines: sent one by one ahead of the body, `delay_s / num_blank_lines` apart, as DeepSeek does while
            a request waits.
        is_held: waits until as many calls are open as the endpoint gathers.
        fault: `disconnect` closes without a byte, `half_body` after half of the body, `silence` never answers.
    """

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    events: Sequence[Any] | None = None
    delay_s: float = 0.0
    num_blank_lines: int = 0
    is_held: bool = False
    fault: Fault = "none"


class FakeEndpoint:
    """Serves `/chat/completions` below any path.

    Attributes:
        calls: what arrived, in order.
        peak_in_flight: most calls that were open at a time.
        max_in_flight: calls beyond it get a 429; 0 is no limit.
        num_refused: calls that got one for that.
    """

    def __init__(
        self,
        reply: Callable[[Call], Reply],
        *,
        max_in_flight: int = 0,
        gather_at: int = 0,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        on_end: Callable[[Call, Reply, bool], None] | None = None,
    ) -> None:
        """Args:
        tls: serves HTTPS; a certificate that is loaded into it later holds for connections made from then on.
        on_end: told when a call ended, with whether its reply went out while the client was still there.
        """
        self._reply = reply
        self._gather_at = gather_at
        self._gathered: asyncio.Event | None = None
        self._port = port
        self._tls = tls
        self._on_end = on_end
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.max_in_flight = max_in_flight
        self.calls: list[Call] = []
        self.peak_in_flight = 0
        self.num_refused = 0
        self._in_flight = 0
        self._numbers = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fake-endpoint", daemon=True)
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None

    @property
    def base_url(self) -> str:
        return f"{'http' if self._tls is None else 'https'}://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> "FakeEndpoint":
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *unused: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    @property
    def num_in_flight(self) -> int:
        """Calls that are open now, the one that is replied to included."""
        return self._in_flight

    def serve(self) -> None:
        """Serve in this thread, until the process ends."""
        self._run()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    def schedule(self, action: Callable[[], object], delay_s: float = 0.0) -> None:
        """Call something in the server's loop, from any thread."""
        self._loop.call_soon_threadsafe(self._loop.call_later, delay_s, action)

    async def open_port(self) -> None:
        """Accept connections; in the server's loop, as the next two."""
        if self._server is None:
            self._server = await asyncio.start_server(
                self._connection, "127.0.0.1", self._port, backlog=4096, ssl=self._tls
            )
            self._port = self._server.sockets[0].getsockname()[1]

    def close_port(self) -> None:
        """Refuse connections, and cut those that are open."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut_connections()

    def cut_connections(self) -> None:
        """Reset every open connection, whatever it carries."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self) -> None:
        self._stop, self._gathered = asyncio.Event(), asyncio.Event()
        await self.open_port()
        self._started.set()
        await self._stop.wait()
        if self._server is not None:
            self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its reply; whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        content = await reader.readexactly(int(headers.get("content-length", "0")))
        call = Call(next(self._numbers), head[0].split(" ")[1], headers, json.loads(content or b"{}"))
        self.calls.append(call)
        self._in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
        reply, is_sent = Reply(), False
        try:
            if self.max_in_flight and self._in_flight > self.max_in_flight:
                self.num_refused += 1
                reply = Reply({"error": {"message": "too many requests", "type": "rate_limit"}}, status=429)
            else:
                reply = self._reply(call)
            assert self._gathered is not None
            if self._in_flight >= self._gather_at:
                self._gathered.set()
            if reply.is_held:
                await self._gathered.wait()
            stays_open = await _send(reply, writer)
            is_sent = not reader.at_eof()
            return stays_open
        finally:
            self._in_flight -= 1
            if self._on_end is not None:
                self._on_end(call, reply, is_sent)


async def _send(reply: Reply, writer: asyncio.StreamWriter) -> bool:
    if reply.fault == "silence":
        await asyncio.sleep(3600)
    if not reply.num_blank_lines:
        await asyncio.sleep(reply.delay_s)
    if reply.fault == "disconnect":
        writer.transport.abort()
        return False
    kind = "application/json" if reply.events is None else "text/event-stream"
    lines = [f"HTTP/1.1 {reply.status} X", f"content-type: {kind}"]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    if reply.events is not None or reply.num_blank_lines or reply.fault == "half_body":
        # Without a length the body ends with the connection, as far as it got.
        writer.write("\r\n".join([*lines, "transfer-encoding: chunked", "", ""]).encode())
        for _ in range(reply.num_blank_lines):
            await asyncio.sleep(reply.delay_s / reply.num_blank_lines)
            _write_chunk(writer, b"\n")
            await writer.drain()
        for event in reply.events or ():
            text = event if isinstance(event, str) else f"data: {json.dumps(event, ensure_ascii=False)}"
            _write_chunk(writer, f"{text}\n\n".encode())
            await writer.drain()
        if reply.events is None:
            content = _content(reply)
            _write_chunk(writer, content[: len(content) // 2] if reply.fault == "half_body" else content)
        if reply.fault == "half_body":
            await writer.drain()
            writer.transport.abort()
            return False
        writer.write(b"0\r\n\r\n")
    else:
        content = _content(reply)
        writer.write("\r\n".join([*lines, f"content-length: {len(content)}", "", ""]).encode() + content)
    await writer.drain()
    return True


def _content(reply: Reply) -> bytes:
    return reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body, ensure_ascii=False).encode()


def _write_chunk(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


def deepseek(text: str = "{}", *, hit: int = 64, miss: int = 36, completion: int = 10, **values: Any) -> dict[str, Any]:
    """A whole answer as DeepSeek gives it; `values` replace fields of the message, `finish_reason` and `reasoning`."""
    reasoning = values.pop("reasoning", 0)
    return {
        "id": "0195",
        "object": "chat.completion",
        "created": 1790000000,
        "model": values.pop("model", "deepseek-v4-flash"),
        "system_fingerprint": values.pop("system_fingerprint", "fp_deep"),
        "choices": [
            {
                "index": 0,
                "finish_reason": values.pop("finish_reason", "stop"),
                "logprobs": None,
                "message": {"role": "assistant", "content": text, **values},
            }
        ],
        "usage": {
            "prompt_tokens": hit + miss,
            "completion_tokens": completion,
            "total_tokens": hit + miss + completion,
            "prompt_cache_hit_tokens": hit,
            "prompt_cache_miss_tokens": miss,
            "prompt_tokens_details": {"cached_tokens": hit},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        },
    }


def with_usage(answer: Mapping[str, Any], usage: Mapping[str, Any] | None) -> dict[str, Any]:
    """The same answer with another provider's usage."""
    return {**answer, "usage": usage}


ALIBABA_USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 10,
    "total_tokens": 110,
    "prompt_tokens_details": {"cached_tokens": 48, "text_tokens": 100},
    "completion_tokens_details": {"reasoning_tokens": 4, "text_tokens": 6},
}
VOLCANO_USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 10,
    "total_tokens": 110,
    "prompt_tokens_details": {"cached_tokens": 32},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
VLLM_USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 10,
    "total_tokens": 110,
    "prompt_tokens_details": None,
}


def as_events(answer: Mapping[str, Any], *, piece: int = 7, keep_alives: int = 0) -> list[Any]:
    """The same answer in pieces: reasoning, text, calls, the end, then the usage in a chunk of its own."""
    choice = answer["choices"][0]
    message = choice["message"]
    head = {name: answer[name] for name in ("id", "created", "model", "system_fingerprint")}

    def chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": None}

    events: list[Any] = [": keep-alive"] * keep_alives
    events.append(chunk({"role": "assistant", "content": ""}))
    for name in ("reasoning_content", "content"):
        text = message.get(name) or ""
        events += [chunk({name: text[at : at + piece]}) for at in range(0, len(text), piece)]
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = call["function"]
        events.append(
            chunk({"tool_calls": [{"index": index, **call, "function": {"name": function["name"], "arguments": ""}}]})
        )
        arguments = function["arguments"]
        events += [
            chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments[at : at + piece]}}]})
            for at in range(0, len(arguments), piece)
        ]
    events.append(chunk({}, choice["finish_reason"]))
    events.append({**head, "choices": [], "usage": answer["usage"]})
    return [*events, "data: [DONE]"]


def error(status: int, message: str = "no", *, code: str | None = None, **headers: str) -> Reply:
    """A refusal in OpenAI's error form; the names of headers have `_` for `-`."""
    return Reply(
        {"error": {"message": message, "type": "error", "param": None, "code": code}},
        status=status,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


def main() -> None:
    """Serve DeepSeek's form with given shares of trouble; prints the port."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.servers.fake_endpoint")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay_s", type=float, default=0.0)
    parser.add_argument("--text_bytes", type=int, default=400)
    parser.add_argument("--max_in_flight", type=int, default=0)
    parser.add_argument("--refused", type=float, default=0.0, help="share of calls that get a 429")
    args = parser.parse_args()
    answer = json.dumps(deepseek("x" * args.text_bytes)).encode()
    draw = random.Random(0).random

    def reply(call: Call) -> Reply:
        endpoint.calls.clear()
        return error(429, retry_after="1") if draw() < args.refused else Reply(answer, delay_s=args.delay_s)

    endpoint = FakeEndpoint(reply, max_in_flight=args.max_in_flight, port=args.port)
    endpoint.serve()


if __name__ == "__main__":
    main()
