"""Flipped bits in numbers: `python -m benchmarks.flipped_bytes --per-kind 40 --json OUT`.

Three small runs (finished, stopped, killed before anything was published) have one bit of a byte flipped, in a file of
every kind, and every reader looks at each copy: status, report, export, reconcile, answers, and of a finished run
estimate, reuse and retry, of the others their next launch. `--per-kind 0` flips every byte, which takes days. The
readers run in a process of their own, so that one that dies costs a single flip. Exits with 1 if a reader gave other
figures without a word, an error that does not name the file or is not for people, or died.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from tests.support.flipped_bytes import (
    FINE,
    Flip,
    FlippedRun,
    Tally,
    Verdict,
    file_sizes,
    list_flips,
    make_runs,
    pick_flips,
)


def sweep(run: FlippedRun, flips: Sequence[Flip], folder: Path) -> Tally:
    """Judge every flip; a process that dies counts for the flip that it was at."""
    tally, left = Tally(), [*flips]
    context = get_context("spawn")
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_judge, args=(run, left, folder, theirs), daemon=True)
        process.start()
        theirs.close()
        num_done = 0
        for found in _receive(ours):
            tally.add(left[num_done], found)
            num_done += 1
        process.join()
        if num_done < len(left):
            tally.add(left[num_done], {"process": ("crash", f"exit code {process.exitcode}")})
            num_done += 1
        left = left[num_done:]
    return tally


def _judge(run: FlippedRun, flips: Sequence[Flip], folder: Path, results: Connection) -> None:
    for flip in flips:
        results.send(run.judge([flip], folder))


def _receive(results: Connection) -> Iterator[dict[str, tuple[Verdict, str]]]:
    try:
        while True:
            yield results.recv()
    except EOFError:
        return


def main() -> None:
    """Parse the arguments, sweep the three runs, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--per-kind", type=int, default=40, help="flips of each kind of file; 0 flips every byte")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    answer: dict[str, Any] = {}
    total = Counter[str]()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        encoder = PromptEncoder.load(str(CHECKPOINT_PATH), "auto")
        for name, run in make_runs(folder, Path(CHECKPOINT_PATH), encoder).items():
            output = run.run.output
            flips = pick_flips(output, args.per_kind, args.seed) if args.per_kind else [*list_flips(output, args.seed)]
            started = time.monotonic()
            tally = sweep(run, flips, folder)
            total += tally.totals
            answer[name] = {
                "num_files": len(file_sizes(output)),
                "num_flips": len(flips),
                "seconds": round(time.monotonic() - started, 1),
                "verdicts": dict(tally.totals),
                "by_kind": {kind: dict(counts) for kind, counts in sorted(tally.by_kind.items())},
                "examples": tally.examples,
            }
            print(f"{name}: {dict(tally.totals)}", file=sys.stderr)
    text = json.dumps({"total": dict(total), **answer}, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text)
    sys.exit(0 if FINE.issuperset(total) else 1)


if __name__ == "__main__":
    main()
