"""Writes chats.parquet: one chat a row, as a list of messages."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

QUESTIONS = {
    "chat-1": "Where is order 4711?",
    "chat-2": "What will the weather be in Oslo tomorrow?",
    "chat-3": "Where is my order? I lost the number.",
    "chat-4": "Thank you, that was all.",
}
SYSTEM = "You help customers of a bookshop. Call a function where one answers the question."


def main() -> None:
    rows = [
        {
            "chat_id": chat_id,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}],
        }
        for chat_id, question in QUESTIONS.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows), Path(__file__).with_name("chats.parquet"))


if __name__ == "__main__":
    main()
