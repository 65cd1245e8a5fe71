"""How long a quote takes and how much memory: `python -m benchmarks.estimate [--rows N] [--tokens N]`.

Prompts share a system text and a prefix by customer; what follows is of each row alone. Prints one line of JSON. The
quote runs in a process of its own, as a person would run it, imports included.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder

_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
_NUM_CUSTOMERS = 500
_WORDS = (
    *(
        "the",
        "server",
        "answers",
        "slowly",
        "since",
        "this",
        "morning",
        "we",
        "see",
        "errors",
        "in",
        "region",
        "please",
    ),
    *("check", "quota", "and", "billing", "for", "account", "our", "job", "stopped", "with", "message", "again"),
)

_JOB = """
[input]
path = "prompts.parquet"
[prompt]
system = "You sort support tickets. Answer with one JSON object."
template = "{{ customer }}\\n\\n{{ body }}"
[output]
path = "out"
[model]
engine = "torch"
path = "@CHECKPOINT@"
name = "deepseek-v4-flash"
[sampling]
max_tokens = 160
"""


def write_input(folder: Path, *, num_rows: int, num_tokens: int) -> None:
    """Write prompts of about so many tokens, and a job over them."""
    draw = random.Random(0)
    encoder = PromptEncoder.load(str(CHECKPOINT_PATH))
    sample = " ".join(draw.choice(_WORDS) for _ in range(500))
    per_word = encoder.encode_batch([sample])[0].shape[0] / 500
    num_words = max(1, round((num_tokens - 40) / per_word))
    rows = range(num_rows)
    customers = [f"customer {draw.randrange(_NUM_CUSTOMERS):04d}, tier gold, region eu-west" for _ in rows]
    bodies = [" ".join(draw.choices(_WORDS, k=num_words)) for _ in rows]
    pq.write_table(pa.table({"customer": customers, "body": bodies}), folder / "prompts.parquet", row_group_size=20_000)
    (folder / "job.toml").write_text(_JOB.replace("@CHECKPOINT@", str(CHECKPOINT_PATH)))


def quote(folder: Path, *args: str) -> dict[str, Any]:
    """Quote the job of a folder in a process of its own; what it took, and what it answered.

    Its peak is what it says itself when it ends, as the parent's counter takes all children together.
    """
    words = ["estimate", str(folder / "job.toml"), "--json", *args]
    told = "import resource, sys; from moebeam.jobs.commands.cli import run_command; code = run_command(sys.argv[1:]); "
    told += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    program = [sys.executable, "-c", told, *words]
    start = time.perf_counter()
    with subprocess.Popen(program, stdout=subprocess.PIPE, env=dict(os.environ)) as process:
        assert process.stdout is not None
        line, peak_rss = process.stdout.read().decode().splitlines()
        exit_code = process.wait()
    elapsed_s = time.perf_counter() - start
    answer = json.loads(line)
    assert exit_code == 0, answer
    own = answer["offers"][0]["cost"]
    return {
        "args": list(args),
        "elapsed_s": round(elapsed_s, 1),
        "peak_rss_mib": round(int(peak_rss) * _RSS_UNIT_BYTES / 2**20),
        "rows": answer["num_rows"],
        "prompt_tokens": answer["prompt_tokens"]["expected"],
        "tree_tokens": answer["tree_tokens"]["expected"],
        "max_hit_rate": round(answer["max_hit_rate"], 4),
        "expected_cost": own and own["expected"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--write", metavar="FOLDER", help="Only write the input.")
    options = parser.parse_args()
    if options.write is not None:
        write_input(Path(options.write), num_rows=options.rows, num_tokens=options.tokens)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: a child starts with its parent's peak memory.
        sizes = ["--rows", str(options.rows), "--tokens", str(options.tokens)]
        subprocess.run([sys.executable, "-m", "benchmarks.estimate", "--write", name, *sizes], check=True)
        for args in (("--sample", "2000"), ()):
            print(json.dumps(quote(folder, *args)), flush=True)


if __name__ == "__main__":
    main()
