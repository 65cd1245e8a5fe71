"""Writes reviews.parquet: `python make_reviews.py [NUM_ROWS]`."""

import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TITLES = ("Works well", "Broken on arrival", "Does what it says", "Never again", "A present for my father")
BODIES = (
    "It arrived in two days and the battery lasts a week. Great.",
    "The screen was cracked and nobody answers my letters. Terrible.",
    "It is a kettle. It boils water.",
    "I want my money back: the handle broke after one use. Terrible.",
    "He uses it every day. Great.",
)
COUNTRIES = ("DE", "FR", "JP", "US")


def main() -> None:
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    rng = random.Random(7)
    rows = [
        {
            "review_id": f"review-{index:05d}",
            "country": rng.choice(COUNTRIES),
            "title": rng.choice(TITLES),
            "body": "" if index % 20 == 19 else rng.choice(BODIES),
        }
        for index in range(num_rows)
    ]
    pq.write_table(pa.Table.from_pylist(rows), Path(__file__).with_name("reviews.parquet"), row_group_size=1000)


if __name__ == "__main__":
    main()
