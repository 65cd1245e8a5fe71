"""A stand-in for the Hugging Face Hub: one dataset below a folder on disk, served as `huggingface_hub` asks for it."""

import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "acme/reviews"
_SHA = "0" * 40


@contextmanager
def serve_hub(folder: Path) -> Generator[str]:
    """Serve the files below `folder` as revision `main` of the dataset `REPO`; the Hub's address."""

    class Handler(_HubHandler):
        root = folder

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _HubHandler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        api, tree = f"/api/datasets/{REPO}", f"/api/datasets/{REPO}/tree/main"
        resolve = f"/datasets/{REPO}/resolve/main/"
        if path in (api, f"{api}/revision/main"):
            self._reply_json({"_id": "1", "id": REPO, "sha": _SHA, "private": False, "tags": [], "siblings": []})
        elif path == tree or path.startswith(f"{tree}/"):
            is_recursive = parse_qs(parts.query).get("recursive") == ["True"]
            self._reply_tree(self.root / path.removeprefix(tree).lstrip("/"), is_recursive=is_recursive)
        elif path.startswith(resolve) and (self.root / path.removeprefix(resolve)).is_file():
            self._reply_file((self.root / path.removeprefix(resolve)).read_bytes())
        else:
            self._refuse("RepoNotFound" if REPO not in path else "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked)["paths"]
        found = [self.root / path for path in paths]
        self._reply_json([self._describe(path) for path in found if path.exists()])

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing of requests on the screen of tests."""

    def _reply_tree(self, folder: Path, *, is_recursive: bool) -> None:
        if not folder.is_dir():
            self._refuse("EntryNotFound")
            return
        entries = folder.rglob("*") if is_recursive else folder.iterdir()
        self._reply_json([self._describe(path) for path in sorted(entries)])

    def _describe(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.root).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": _SHA, "size": 0}
        content = path.read_bytes()
        return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}

    def _reply_file(self, content: bytes) -> None:
        start, end = 0, len(content)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(end, int(last) + 1) if last else end
        self._reply(
            206 if wanted else 200, content[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        )

    def _reply_json(self, value: object) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: str) -> None:
        self._reply(404, b'{"error": "not found"}', {"X-Error-Code": code, "Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
