"""Writes questions.jsonl: one request of OpenAI's Batch API a line."""

import json
from pathlib import Path

QUESTIONS = ("What is the capital of France?", "What is the capital of Japan?", "What is the capital of Peru?")


def main() -> None:
    lines = [
        json.dumps(
            {
                "custom_id": f"question-{index}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": "capitals",
                    "messages": [{"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}],
                },
            }
        )
        for index in range(12)
    ]
    Path(__file__).with_name("questions.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
