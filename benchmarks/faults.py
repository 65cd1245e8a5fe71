"""Kills and faults in numbers: `python -m benchmarks.faults --kills 200 --sweep --json OUT`.

Kills: runs of the command line are killed with SIGKILL at seeded instants of every phase, alone, with their workers, or
workers alone, and run again until they are done. Sweep: every file operation and every engine call of a small run fails
once, in every way it can. Endpoint: `--endpoint` runs 50 scripts (`benchmarks/endpoint_chaos/`) of 40 rows each against
a provider that fails in every way it can, while the runs are stopped by signals and budgets. The tables must always
equal those of an undisturbed run. Exits with 1 if anything was lost, doubled or left over.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.endpoint_chaos.figures import count_endpoint_faults
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.jobs.run.launch import launch
from tests.support.disturbances.disturbed_runs import Tables, Work, tables_of
from tests.support.disturbances.faulty_storage import Fault, Outcome, faults_of, operations_of, outcome_of
from tests.support.disturbances.killed_runs import WORKERS, KillCount, Victim, kill_series, undisturbed_run

# (share of the kills, victims, arguments of the run)
MIXTURE: tuple[tuple[float, tuple[Victim, ...], tuple[str, ...]], ...] = (
    (0.6, ("group",), ()),
    (0.4, ("group", "launcher", "worker"), WORKERS),
)


def count_kills(folder: Path, *, num_kills: int, num_rows: int, seed: int) -> dict[str, Any]:
    """Kill so many runs; what happened, with the problems that were found."""
    total: dict[str, Any] = {"seconds": 0.0, "problems": []}
    for number, (share, victims, args) in enumerate(MIXTURE):
        part = folder / f"kills-{number}"
        part.mkdir(parents=True)
        work = Work(part, Path(CHECKPOINT_PATH), num_rows, latency_ms=2).write()
        undisturbed, run_s = undisturbed_run(work, args)
        started = time.monotonic()
        count = KillCount()
        series = kill_series(
            work, undisturbed, num_kills=round(num_kills * share), seed=seed, run_s=run_s, victims=victims, args=args
        )
        for count in series:
            print(f"{count.num_kills} kills, {count.num_runs} runs, problems: {count.problems}", file=sys.stderr)
        total["seconds"] += time.monotonic() - started
        total["problems"] += count.problems
        for name in ("num_kills", "num_runs", "num_outputs", "num_looks", "num_hung"):
            total[name] = total.get(name, 0) + getattr(count, name)
        for name in ("by_trigger", "by_victim", "by_phase"):
            total[name] = dict(Counter(total.get(name, {})) + getattr(count, name))
    return total


def sweep(folder: Path, *, num_rows: int, num_processes: int, sample: int = 1) -> dict[str, Any]:
    """Let every operation fail once in every way; `sample` takes only every so manieth fault."""
    folder.mkdir(parents=True)
    work = Work(folder, Path(CHECKPOINT_PATH), num_rows, max_shard_rows=25).write()
    launch(work.job(folder / "undisturbed"))
    undisturbed = tables_of(folder / "undisturbed")
    operations = operations_of(work)
    faults = faults_of(operations)[::sample]
    started = time.monotonic()
    with ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_be_quiet) as pool:
        outcomes = list(pool.map(partial(_outcome, work, undisturbed), enumerate(faults), chunksize=4))
    return {
        "num_operations": len(operations),
        "num_faults": len(faults),
        "seconds": time.monotonic() - started,
        "by_kind": dict(Counter(outcome.fault.kind for outcome in outcomes)),
        "by_operation": dict(Counter(outcome.fault.operation.name for outcome in outcomes)),
        "first_runs": dict(Counter(outcome.first for outcome in outcomes)),
        "problems": [
            f"{outcome.fault.operation} {outcome.fault.kind}: {problem}"
            for outcome in outcomes
            for problem in outcome.problems
        ],
    }


def _be_quiet() -> None:
    logging.disable(logging.CRITICAL)


def _outcome(work: Work, undisturbed: Tables, numbered: tuple[int, Fault]) -> Outcome:
    number, fault = numbered
    output = work.folder / f"out-{number}"
    try:
        return outcome_of(work, undisturbed, fault, output)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what was asked for, print it as JSON, and exit with 1 if there was any problem."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--sample", type=int, default=1, help="take only every so manieth fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=600, help="rows of the runs that are killed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--endpoint", action="store_true", help="scripts of a provider that fails")
    parser.add_argument("--scripts", type=int, default=50)
    parser.add_argument("--requests", type=int, default=2000, help="rows of all scripts together")
    parser.add_argument("--time-scale", type=float, default=1.0, help="multiplies outages of 1 to 90 s")
    parser.add_argument("--parallel", type=int, default=4, help="scripts at a time")
    parser.add_argument("--keep", type=Path, help="folder for the files of scripts with a problem")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="moebeam-faults-") as name:
        if args.kills:
            found["kills"] = count_kills(Path(name), num_kills=args.kills, num_rows=args.rows, seed=args.seed)
        if args.sweep:
            _be_quiet()
            folder = Path(name) / "sweep"
            found["sweep"] = sweep(folder, num_rows=60, num_processes=args.processes, sample=args.sample)
        if args.endpoint:
            found["endpoint"] = count_endpoint_faults(
                args.keep or Path(name) / "endpoint",
                num_scripts=args.scripts,
                num_requests=args.requests,
                seed=args.seed,
                time_scale=args.time_scale,
                num_parallel=args.parallel,
            )
    text = json.dumps(found, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    sys.exit(any(part["problems"] for part in found.values()))


if __name__ == "__main__":
    main()
