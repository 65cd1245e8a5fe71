"""What it costs to go on with a run that is nearly done: `python -m benchmarks.resume --rows 1000000 --done 0.95`.

A run with the `fake` engine is measured whole. Then the last of its shards lose their commits and tables, as if they
had never been answered, and `moebeam resume` is measured on what is left. Beyond the missing share of the work a
resume should take next to nothing, and its memory should not grow with the rows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import machine_facts, machine_line
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH

ROWS_A_GROUP = 50_000
_COMMAND = [sys.executable, "-c", "from moebeam.jobs.commands.cli import main; main()"]


@dataclass(frozen=True, slots=True)
class Measured:
    """One command: wall and processor seconds, and the peak memory of its process."""

    wall_s: float
    cpu_s: float
    peak_gib: float


def measured(*args: str) -> Measured:
    """Run a `moebeam` command in a process of its own.

    Raises:
        SystemExit: it failed; its last words are in the message.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([*_COMMAND, *args, "--quiet", "--json"], stdout=errors, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            raise SystemExit(f"moebeam {' '.join(args)}: {errors.read()[-2000:].decode(errors='replace')}")
    return Measured(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


def write_job(folder: Path, num_rows: int) -> Path:
    """Rows of one short text each, and a job over them."""
    source = folder / "in.parquet"
    with pq.ParquetWriter(source, pa.schema([("id", pa.string()), ("text", pa.string())])) as writer:
        for start in range(0, num_rows, ROWS_A_GROUP):
            rows = range(start, min(num_rows, start + ROWS_A_GROUP))
            writer.write_table(
                pa.table({"id": [f"row-{row}" for row in rows], "text": [f"ticket number {row:09d}" for row in rows]})
            )
    job = folder / "job.toml"
    job.write_text(
        f"""
        input = {{ path = {json.dumps(str(source))}, id_column = "id" }}
        prompt = {{ template = "Classify: {{{{ text }}}}" }}
        output = {{ path = {json.dumps(str(folder / "out"))} }}
        sampling = {{ max_tokens = 64 }}
        model = {{ engine = "fake", path = {json.dumps(str(CHECKPOINT_PATH))}, name = "fake" }}
        """
    )
    return job


def undo(output: Path, done_share: float) -> tuple[int, int]:
    """Take the last shards of a finished run back to before they were answered; how many, and of how many rows."""
    manifest = json.loads((output / "manifest.json").read_text())
    plan = json.loads((output / "_moebeam" / "plan" / "plan.json").read_text())
    shards = plan["shards"]
    undone = shards[round(done_share * len(shards)) :]
    for shard in undone:
        (output / "_moebeam" / "commits" / f"{shard['shard']}.json").unlink()
        for table in ("results", "rejects", "ledger"):
            (output / table / f"part-{shard['shard']}.parquet").unlink(missing_ok=True)
    manifest["status"] = "incomplete"
    (output / "manifest.json").write_text(json.dumps(manifest))
    return len(undone), sum(shard["num_rows"] for shard in undone)


def compare(num_rows: int, done_share: float, work: Path) -> dict[str, object]:
    """Measure a whole run and a resume of the same rows."""
    job = write_job(work, num_rows)
    whole = measured("run", str(job))
    num_shards, num_left = undo(work / "out", done_share)
    resumed = measured("resume", str(work / "out"))
    share = num_left / num_rows
    return {
        "rows": num_rows,
        "rows_left": num_left,
        "shards_left": num_shards,
        "whole_s": whole.wall_s,
        "resume_s": resumed.wall_s,
        "beyond_the_work": resumed.wall_s / whole.wall_s - share,
        "beyond_the_work_cpu": resumed.cpu_s / whole.cpu_s - share,
        "whole_peak_gib": whole.peak_gib,
        "resume_peak_gib": resumed.peak_gib,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resume", description="What it costs to go on with a run that is nearly done."
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--done", type=float, default=0.95, help="share of the shards that stay")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    args = parser.parse_args(argv)
    found: list[dict[str, object]] = []
    for num_rows in args.rows:
        work = Path(tempfile.mkdtemp(prefix="resume-"))
        try:
            found.append(compare(num_rows, args.done, work))
        finally:
            shutil.rmtree(work)
        print(machine_line(machine_facts()), file=sys.stderr)
        print(
            "{rows:,} rows: whole {whole_s:.1f} s, resume of {rows_left:,} rows {resume_s:.1f} s, which is "
            "{beyond_the_work:+.1%} of the whole beyond its work ({beyond_the_work_cpu:+.1%} of processor time); "
            "peak {whole_peak_gib:.2f} and {resume_peak_gib:.2f} GiB".format(**found[-1]),
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
