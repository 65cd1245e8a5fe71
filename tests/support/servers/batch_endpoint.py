"""OpenAI's Files and Batches on this machine, answering and misbehaving as told, for the engine's batch mode.

`BatchEndpoint(answer)` serves from threads of its own while it is entered; what it holds outlives every client.
"""

import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["none", "refused", "lost", "half_body"]
"""`refused` is a 500 before anything is done; `lost` does it and closes without a byte; `half_body` breaks off."""

Answer = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
"""A request's line -> the `response` and `error` of its outcome; None leaves the line out of both files."""


@dataclass(slots=True)
class HeldBatch:
    """A batch and how it goes on: `num_looks` looks until it ends as `ending`."""

    fields: dict[str, Any]
    num_looks: int
    ending: str


@dataclass
class BatchEndpoint:
    """Serves `/v1/files` and `/v1/batches`.

    Attributes:
        answer: what becomes of each line.
        endings: how the next batches end; `completed` when there is none left.
        num_looks: how often a batch is looked at before it ends.
        fault: what befalls a call, by method and path.
        keeps_metadata: some providers do not.
        calls: method and path of every call.
    """

    answer: Answer
    num_looks: int = 1
    endings: list[str] = field(default_factory=list[str])
    fault: Callable[[str, str], Fault] = lambda method, path: "none"
    keeps_metadata: bool = True
    page_size: int = 100
    batches: dict[str, HeldBatch] = field(default_factory=dict[str, HeldBatch])
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    calls: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    headers: list[Mapping[str, str]] = field(default_factory=list[Mapping[str, str]])
    failure: Mapping[str, Any] | None = None

    def __enter__(self) -> "BatchEndpoint":
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies of all lines of all batches that began, as often as they were submitted."""
        begun = [batch for batch in self.batches.values() if batch.ending != "failed"]
        return [line["body"] for batch in begun for line in self.lines(batch.fields["input_file_id"])]

    def lines(self, file_id: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[file_id].decode().split("\n") if line.strip()]

    def end_now(self) -> None:
        """End all batches that have not, though nobody looks."""
        for batch in self.batches.values():
            if batch.fields["status"] in ("in_progress", "validating"):
                self._finish(batch)

    def respond(self, method: str, path: str, content: bytes, kind: str) -> tuple[int, Any]:
        with self._lock:
            path, _, query = path.partition("?")
            parts = path.removeprefix("/v1/").split("/")
            match method, parts:
                case "POST", ["files"]:
                    return 200, self._upload(content, kind)
                case "GET", ["files", file_id, "content"]:
                    return 200, self.files[file_id]
                case "POST", ["batches"]:
                    return 200, self._create(json.loads(content))
                case "GET", ["batches"]:
                    return 200, self._list(query)
                case "GET", ["batches", batch_id]:
                    return 200, self._look(self.batches[batch_id])
                case _:
                    return 404, {"error": {"message": f"no {method} {path}"}}

    def _upload(self, content: bytes, kind: str) -> Mapping[str, Any]:
        boundary = kind.partition("boundary=")[2].encode()
        for part in content.split(b"--" + boundary):
            head, _, body = part.partition(b"\r\n\r\n")
            if b'name="file"' in head:
                file_id = f"file-{next(self._numbers)}"
                self.files[file_id] = body.removesuffix(b"\r\n")
                return _file(file_id, len(body))
        raise AssertionError("an upload without a file")

    def _create(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        assert wanted["input_file_id"] in self.files
        batch_id = f"batch-{next(self._numbers)}"
        ending = self.endings.pop(0) if self.endings else "completed"
        fields: dict[str, Any] = {
            "id": batch_id,
            "object": "batch",
            "endpoint": wanted["endpoint"],
            "completion_window": wanted["completion_window"],
            "input_file_id": wanted["input_file_id"],
            "metadata": wanted.get("metadata") if self.keeps_metadata else None,
            "created_at": int(time.time()),
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
        }
        self.batches[batch_id] = HeldBatch(fields, self.num_looks, ending)
        return fields

    def _list(self, query: str) -> Mapping[str, Any]:
        newest_first = [batch.fields for batch in reversed(self.batches.values())]
        after = dict(part.split("=") for part in query.split("&") if part).get("after")
        start = next((place for place, fields in enumerate(newest_first, 1) if fields["id"] == after), 0)
        page = newest_first[start : start + self.page_size]
        return {"object": "list", "data": page, "has_more": start + len(page) < len(newest_first)}

    def _look(self, batch: HeldBatch) -> Mapping[str, Any]:
        fields = batch.fields
        if fields["status"] in ("validating", "in_progress"):
            fields["status"] = "in_progress"
            batch.num_looks -= 1
            if batch.num_looks < 0:
                self._finish(batch)
        return fields

    def _finish(self, batch: HeldBatch) -> None:
        fields, now = batch.fields, int(time.time())
        fields["status"] = batch.ending
        if batch.ending == "failed":
            fields["errors"] = {"object": "list", "data": [self.failure or {"code": "invalid_file", "message": "no"}]}
            return
        fields[f"{batch.ending}_at"] = fields["created_at"] + 90 if batch.ending == "completed" else now
        output, errors = list[bytes](), list[bytes]()
        # Providers answer in an order of their own.
        for line in reversed(self.lines(fields["input_file_id"])):
            found = self.answer(line["body"])
            if found is not None:
                outcome = {"id": f"req-{next(self._numbers)}", "custom_id": line["custom_id"], **found}
                target = output if (outcome.get("response") or {}).get("status_code") == 200 else errors
                target.append(json.dumps(outcome, ensure_ascii=False).encode() + b"\n")
        for name, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                fields[name] = f"file-{next(self._numbers)}"
                self.files[fields[name]] = b"".join(lines)


def _file(file_id: str, num_bytes: int) -> Mapping[str, Any]:
    return {
        "id": file_id,
        "object": "file",
        "bytes": num_bytes,
        "created_at": int(time.time()),
        "filename": "requests.jsonl",
        "purpose": "batch",
        "status": "processed",
    }


def _handler(endpoint: BatchEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def _serve(self) -> None:
            content = self._content()
            endpoint.calls.append((self.command, self.path.partition("?")[0]))
            endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
            fault = endpoint.fault(self.command, self.path)
            if fault == "refused":
                status, value = 500, {"error": {"message": "down"}}
            else:
                status, value = endpoint.respond(self.command, self.path, content, self.headers.get("content-type", ""))
            if fault == "lost":
                self.close_connection = True
                return
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if fault == "half_body":
                body, self.close_connection = body[: len(body) // 2], True
            self.wfile.write(body)

        def _content(self) -> bytes:
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("content-length", "0")))
            pieces: list[bytes] = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
