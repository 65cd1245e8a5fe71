"""A run through chaos, with as many requests as it takes to believe it: `python -m benchmarks.chaos`.

The whole pipeline with the engine `openai` against aimock with 5% drops, 5% malformed responses, 5% refusals and 2%
disconnects; then the tables are held against the fixtures. Exits with 1 where a row is lost, paid twice, or off.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.support.jobs.chaos_job import run_chaos


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos")
    parser.add_argument("--rows", type=int, default=10_000)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = run_chaos(Path(folder), args.rows)
    print(json.dumps(asdict(found), default=str))
    is_whole = found.num_results + found.num_rejects == args.rows
    if not is_whole or found.num_twice or found.num_wrong_usage or found.cost != found.fixtures_cost:
        sys.exit(1)


if __name__ == "__main__":
    main()
