"""An OpenAI-compatible endpoint that knows three capitals: `python server.py --port 8765`.

Listens on this machine only. Token counts are words, which is enough for an example.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima"}


class ChatCompletions(BaseHTTPRequestHandler):
    """Answers POST /v1/chat/completions."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = request["messages"][-1]["content"]
        answer = next((capital for country, capital in CAPITALS.items() if country in question), "I do not know.")
        num_prompt, num_answer = len(question.split()), len(answer.split())
        self._send(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}],
                "usage": {
                    "prompt_tokens": num_prompt,
                    "completion_tokens": num_answer,
                    "total_tokens": num_prompt + num_answer,
                },
            }
        )

    def _send(self, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the terminal free for moebeam's own lines."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an OpenAI-compatible endpoint on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free port")
    with ThreadingHTTPServer(("127.0.0.1", parser.parse_args().port), ChatCompletions) as server:
        print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
