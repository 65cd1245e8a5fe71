"""One machine, all cores: which way to run on it, by memory and rows/s: `python -m benchmarks.one_machine CHECKPOINT`.

The same job of the torch engine runs three ways, taking turns: one worker; several workers with an engine each; several
workers with one engine between them (`[failures] engine_process = "host"`). Memory is the sum over all processes of
what is theirs, shared pages by shares (PSS), sampled all the time. The answers must be equal.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import machine_facts, machine_line
from benchmarks.synthetic_tokenizer import END_TOKEN_ID, SPECIAL_TOKENS, synthetic_tokenizer

SAMPLE_S = 0.1
_ROOT = Path(__file__).resolve().parent.parent
_SHARED_WORDS = 150
_OWN_WORDS = 40

_JOB = """\
[input]
path = {source}

[prompt]
template = "{{{{ text }}}}"

[output]
path = {output}
max_reject_share = 1.0

[model]
engine = "torch"
path = {checkpoint}
max_cache_bytes = 400000000

[sampling]
max_tokens = {max_tokens}

[plan]
max_shard_rows = {shard_rows}

[failures]
engine_process = {process}
"""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to run on one machine."""

    name: str
    engine_process: str
    num_workers: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One run; memory in bytes."""

    way: str
    seconds: float
    num_rows: int
    peak_bytes: int

    @property
    def rows_per_s(self) -> float:
        return self.num_rows / self.seconds


def ways(num_workers: int) -> list[Way]:
    return [
        Way("one worker", "shared", 1),
        Way(f"{num_workers} workers, an engine each", "shared", num_workers),
        Way(f"{num_workers} workers, one engine", "host", num_workers),
    ]


def with_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with a tokenizer of its size, its weights linked."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    if not (folder / "tokenizer.json").exists():
        vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
        synthetic_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
        template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        config = {"chat_template": template, "eos_token": SPECIAL_TOKENS[END_TOKEN_ID]}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_rows(path: Path, num_rows: int) -> None:
    """Prompts with a beginning in common, as tickets under one instruction have."""
    shared = " ".join(f"rule {word}" for word in range(_SHARED_WORDS))
    texts = [f"{shared} " + " ".join(f"ticket {row} {word}" for word in range(_OWN_WORDS)) for row in range(num_rows)]
    pq.write_table(pa.table({"text": texts}), path)


def measured(way: Way, folder: Path, checkpoint: Path, *, num_rows: int, max_tokens: int, turn: int) -> Measured:
    """Run the job one way.

    Raises:
        RuntimeError: it failed.
    """
    output = folder / f"{way.engine_process}-{way.num_workers}-{turn}"
    values = {"source": folder / "in.parquet", "output": output, "checkpoint": checkpoint}
    job_file = folder / f"{output.name}.toml"
    job_file.write_text(
        _JOB.format(
            **{name: json.dumps(str(value)) for name, value in values.items()},
            max_tokens=max_tokens,
            shard_rows=max(1, num_rows // 8),
            process=json.dumps(way.engine_process),
        )
    )
    command = [
        sys.executable,
        "-c",
        "from moebeam.jobs.commands.cli import main; main()",
        "run",
        str(job_file),
        "--quiet",
    ]
    if way.num_workers > 1:
        command += ["--direct_running_mode=multi_processing", f"--direct_num_workers={way.num_workers}"]
    started = time.perf_counter()
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=log)
        peak_bytes = 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, _tree_bytes(process.pid))
            time.sleep(SAMPLE_S)
    if process.returncode not in (0, 3):
        raise RuntimeError(f"{way.name}: exit code {process.returncode}: {(folder / 'log').read_text()[-2000:]}")
    return Measured(way.name, time.perf_counter() - started, num_rows, peak_bytes)


def answers(folder: Path, way: Way) -> list[tuple[object, ...]]:
    """Texts and tokens of a run's results, in the order of the input."""
    columns = ["source_row", "output_text", "prompt_tokens", "completion_tokens"]
    table = pq.read_table(folder / f"{way.engine_process}-{way.num_workers}-0" / "results", columns=columns)
    return sorted(zip(*(table.column(name).to_pylist() for name in columns), strict=True))


def _tree_bytes(pid: int) -> int:
    """What a process and its offspring hold, and the engines that it started for the host."""
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
    except psutil.NoSuchProcess:
        pass
    return total


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", help="folder with weights; a tokenizer is made where there is none")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = with_tokenizer(Path(options.checkpoint).resolve(), folder / "checkpoint")
        write_rows(folder / "in.parquet", options.rows)
        runs = [
            measured(way, folder, checkpoint, num_rows=options.rows, max_tokens=options.max_tokens, turn=turn)
            for turn in range(options.repeats)
            for way in ways(options.workers)
        ]
        found = [answers(folder, way) for way in ways(options.workers)]
    is_equal = all(rows == found[0] for rows in found)
    print(machine_line(machine_facts()))
    best = {
        way.name: min((run for run in runs if run.way == way.name), key=lambda run: run.seconds)
        for way in ways(options.workers)
    }
    first = next(iter(best.values()))
    for run in best.values():
        peak = max(one.peak_bytes for one in runs if one.way == run.way)
        print(
            f"{run.way:28} {run.seconds:7.1f} s {run.rows_per_s:7.2f} rows/s ({run.rows_per_s / first.rows_per_s:.2f}x)"
            f"  peak {peak / 2**20:7.0f} MiB"
        )
    print(f"answers of all ways equal: {is_equal}")
    if options.json:
        Path(options.json).write_text(json.dumps({"runs": [asdict(run) for run in runs], "is_equal": is_equal}))
    if not is_equal:
        sys.exit(1)


if __name__ == "__main__":
    main()
