"""The rows that `benchmarks.pipeline` measures with, and the files of a job over them; equal on every machine.

A row is a support ticket: `account`, a description that it shares with the customer's other tickets, and `text`, its
own words. Read by every contender; the job's files by those that render and validate.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS = 4096
NUM_ACCOUNTS = 50
ACCOUNT_SHARE = 0.25
"""Part of a row's bytes that it shares with other rows."""

SYSTEM = "You sort the tickets of a reseller of accelerator time. Answer with JSON only."
TEMPLATE = "{{ account }}\n\nTicket:\n{{ text }}"

ANSWER = '{"category": "billing", "priority": "high", "amount": 129.5, "due_date": "2026-10-31", "tags": ["refund"]}'
NUM_ANSWER_TOKENS = 40
"""What the script says the answer has, so that the ledger is the same whatever the tokenizer."""

ANSWER_SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "category": {"enum": ["billing", "outage", "quota", "other"]},
        "priority": {"enum": ["low", "normal", "high"]},
        "amount": {"type": ["number", "null"], "minimum": 0},
        "due_date": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 40}, "maxItems": 8},
    },
    "required": ["category", "priority", "amount", "due_date", "tags"],
    "additionalProperties": False,
}
PRICES = """\
provider,model,effective_from_utc,effective_to_utc,window_utc,currency,cache_hit_per_mtok,cache_miss_per_mtok,\
output_per_mtok,evidence,note
fake,benchmark,2020-01-01T00:00:00Z,,,USD,0.028,0.14,0.28,made up,
"""

_SENTENCES = (
    "Our invoice {n} of last month lists {k} hours that nobody here has used.",
    "Since {h}:{m:02d} this morning every request to the {place} endpoint ends in error {n}.",
    "Please raise the quota of project {word}-{n} to {k} accelerators before the launch.",
    "The contract says {k} percent discount, but the statement shows the full price.",
    "Two of our engineers, {name} and {other}, cannot log in to the console any more.",
    "We were promised an answer within {k} hours and are still waiting.",
    "The training job {word}_{n} stopped at step {n} with no message at all.",
    "Could you tell us which price was in force at {h}:{m:02d} UTC, and why?",
    "I attach the report that {name} wrote after the outage in {place}.",
    "If this cannot be settled by Friday, we will have to move {k} workloads elsewhere.",
    "The tokens counted by our gateway ({n}) differ from yours by {k} percent.",
    "A refund of {k}.{m:02d} EUR was announced in ticket {n}, yet it never arrived.",
    "Latency doubled after the update; {word} takes {k} seconds where it took one.",
    "Nothing is urgent here, we only want to understand the bill better.",
    "Kind regards, {name}, on behalf of the whole {word} team.",
)
_PLACES = ("Frankfurt", "Dublin", "Singapore", "Oregon", "Warsaw", "Osaka", "Montreal")
_NAMES = ("Amara", "Bogdan", "Chen", "Dilnoza", "Esteban", "Freya", "Goran", "Hye-jin", "Ines", "Jaromir")
_WORDS = ("ledger", "harbor", "prism", "walnut", "summit", "glacier", "orchid", "tundra", "copper", "violet")


@dataclass(frozen=True, slots=True)
class BenchmarkFiles:
    """Where the files of a benchmark lie, all in one folder."""

    folder: Path

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.parquet"

    @property
    def answer_schema(self) -> Path:
        return self.folder / "answer.schema.json"

    @property
    def script(self) -> Path:
        return self.folder / "script.json"

    @property
    def prices(self) -> Path:
        return self.folder / "prices.csv"


def write_files(folder: Path, *, num_rows: int, row_bytes: int) -> BenchmarkFiles:
    """Write prompts, answer schema, the fake engine's script and a price book into a folder.

    Args:
        row_bytes: UTF-8 bytes of text a row.
    """
    files = BenchmarkFiles(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(files.prompts, num_rows=num_rows, row_bytes=row_bytes)
    files.answer_schema.write_text(json.dumps(ANSWER_SCHEMA))
    files.script.write_text(json.dumps({"default": {"text": ANSWER, "completion_tokens": NUM_ANSWER_TOKENS}}))
    files.prices.write_text(PRICES)
    return files


def write_prompts(path: Path, *, num_rows: int, row_bytes: int) -> None:
    """Write rows as one Parquet file, a row group at a time."""
    schema = pa.schema([pa.field("account", pa.string()), pa.field("text", pa.string())])
    accounts = [_prose(random.Random(f"account {i}"), int(row_bytes * ACCOUNT_SHARE)) for i in range(NUM_ACCOUNTS)]
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, ROW_GROUP_ROWS):
            rows = range(start, min(start + ROW_GROUP_ROWS, num_rows))
            columns = list(zip(*_rows(rows, accounts, row_bytes), strict=True))
            writer.write_table(pa.table([pa.array(column, pa.string()) for column in columns], schema=schema))


def _rows(rows: range, accounts: list[str], row_bytes: int) -> Iterator[tuple[str, str]]:
    for row in rows:
        # A generator of its own for each row: the first rows do not depend on how many follow.
        draw = random.Random(row)
        account = draw.choice(accounts)
        yield account, _prose(draw, row_bytes - len(account))


def _prose(draw: random.Random, num_bytes: int) -> str:
    """Sentences in ASCII, cut to so many bytes."""
    sentences: list[str] = []
    missing = num_bytes
    while missing > 0:
        sentence = draw.choice(_SENTENCES).format(
            n=draw.randrange(1_000, 1_000_000),
            k=draw.randrange(2, 400),
            h=draw.randrange(24),
            m=draw.randrange(60),
            place=draw.choice(_PLACES),
            name=draw.choice(_NAMES),
            other=draw.choice(_NAMES),
            word=draw.choice(_WORDS),
        )
        sentences.append(sentence)
        missing -= len(sentence) + 1
    return " ".join(sentences)[:num_bytes]
