"""Flipped bits in numbers: `python -m benchmarks.flipped_bytes [--per-file 100] [--per-kind 40] --json OUT`.

Three small runs (finished, stopped, killed before anything was published) have one bit of a byte flipped. First every
byte of every file, each read by the one function that reads files of its kind. Then some bytes of every kind of file,
each in a copy of the run that every reader looks at: status, report, export, reconcile, answers, and of a finished run
estimate, reuse and retry, of the others their next launch. These readers run in a process of their own, so that one
that dies costs a single flip. Exits with 1 if a reader gave other figures without a word, an error that does not name
the file or is not for people, or died.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.flipped_bytes.alone import FINE_ALONE, TallyAlone, flip_each_byte
from benchmarks.flipped_bytes.by_all_commands import sweep
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from tests.support.disturbances.flipped_bytes import FINE, Tally, file_sizes, make_runs, pick_flips


def main() -> None:
    """Parse the arguments, sweep the three runs, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=60, help="of each run")
    parser.add_argument("--per-file", type=int, default=0, help="bytes of each file, read alone; 0 is every byte")
    parser.add_argument("--per-kind", type=int, default=40, help="flips of each kind of file, read by all commands")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    answer: dict[str, Any] = {}
    is_fine = True
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        encoder = PromptEncoder.load(str(CHECKPOINT_PATH), "auto")
        for name, run in make_runs(folder, Path(CHECKPOINT_PATH), encoder, args.rows).items():
            output = run.run.output
            started = time.monotonic()
            alone = flip_each_byte(output, args.seed, num_per_file=args.per_file)
            answer[name] = {"num_files": len(file_sizes(output)), "alone": _tell(alone, started)}
            print(f"{name}, each file alone: {dict(alone.totals)}", file=sys.stderr, flush=True)
            started = time.monotonic()
            tally = sweep(run, pick_flips(output, args.per_kind, args.seed), folder)
            answer[name]["by_all_commands"] = _tell(tally, started)
            print(f"{name}, by all commands: {dict(tally.totals)}", file=sys.stderr, flush=True)
            is_fine = is_fine and FINE_ALONE.issuperset(alone.totals) and FINE.issuperset(tally.totals)
    text = json.dumps(answer, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text)
    sys.exit(0 if is_fine else 1)


def _tell(tally: Tally | TallyAlone, started: float) -> dict[str, Any]:
    return {
        "num_flips": tally.totals.total(),
        "seconds": round(time.monotonic() - started, 1),
        "verdicts": dict(tally.totals),
        "by_kind": {kind: dict(counts) for kind, counts in sorted(tally.by_kind.items())},
        "examples": tally.examples,
    }


if __name__ == "__main__":
    main()
