"""vLLM in an interpreter of its own, and what every contender of `benchmarks.engine` is given and gives back.

Run as a script, this file is vLLM's side: `PYTHON vllm_contender.py WORK.json RUN.json`. So it imports nothing that
another environment may lack.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

VLLM_CACHE_GIB = 2
"""What vLLM gets on a CPU where nothing is asked for; its own default is a share of the machine."""

NUM_WARM_UP_TOKENS = 4

# Linux counts in KiB, macOS in bytes.
_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
_GIB = 1 << 30


class ContenderFailed(Exception):
    """An engine could not be started, or left a prompt without an answer."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every contender is given.

    Attributes:
        checkpoint: folder.
        prompts: token ids, in the order in which the engine gets them.
        warm_up: other prompts, run first and not counted.
        stop_token_ids: those that end an answer, as its last token; empty where none does.
        batch_size: most sequences at once; 0 leaves it to the engine.
        max_cache_bytes: of the cache; 0 leaves it to the engine.
        num_threads: of torch; 0 leaves it to torch.
        num_busy: programs that keep a core busy each while the prompts are answered.
    """

    checkpoint: str
    prompts: list[list[int]]
    warm_up: list[list[int]]
    max_tokens: int
    dtype: str = "float32"
    stop_token_ids: tuple[int, ...] = ()
    device: str = "auto"
    batch_size: int = 0
    max_cache_bytes: int = 0
    num_threads: int = 0
    num_busy: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """What a contender did.

    Attributes:
        output_tokens: ids by prompt, in the order of the work.
        computed_prefill_tokens: by the engine's own account.
        peak_rss_bytes: of its processes since they started, loading included.
        peak_device_bytes: allocated on the accelerator; None without one.
        counters: whatever else the engine counts.
    """

    wall_s: float
    load_s: float
    output_tokens: list[list[int]]
    computed_prefill_tokens: int
    peak_rss_bytes: int
    versions: dict[str, str]
    peak_device_bytes: int | None = None
    counters: dict[str, Any] = field(default_factory=dict[str, Any])


@contextmanager
def busy_programs(num_programs: int) -> Generator[None]:
    """Let so many programs compute without end, beside what happens inside the block."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_programs)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def run_vllm(work: Work, python: str) -> Run:
    """vLLM's offline engine in an interpreter that has it; `VLLM_*` of the environment hold, `VLLM_MLA_DISABLE` too.

    Raises:
        ContenderFailed: the interpreter or vLLM ended with an error; its last words are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="moebeam-vllm-") as folder:
        given, found = Path(folder) / "work.json", Path(folder) / "run.json"
        given.write_text(json.dumps(asdict(work)))
        command = [python, str(Path(__file__).resolve()), str(given), str(found)]
        try:
            done = subprocess.run(command, env=vllm_environment(work), capture_output=True, text=True)
        except OSError as error:
            raise ContenderFailed(f"{python}: expected an interpreter that has vLLM, found: {error}") from error
        if done.returncode or not found.exists():
            last_words = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
            raise ContenderFailed(f"{' '.join(command)}: exit code {done.returncode}\n{last_words}")
        return Run(**json.loads(found.read_text()))


def vllm_environment(work: Work) -> dict[str, str]:
    """The environment of vLLM's process.

    Raises:
        ContenderFailed: the cache is no whole number of GiB, which is all that vLLM takes on a CPU.
    """
    environment = {**os.environ}
    if work.max_cache_bytes:
        if work.max_cache_bytes % _GIB:
            raise ContenderFailed(f"vLLM takes a cache of whole GiB, found {work.max_cache_bytes} bytes")
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(work.max_cache_bytes // _GIB)
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(VLLM_CACHE_GIB))
    # Left to itself it keeps a core free, of two.
    environment.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    if work.num_threads:
        environment["OMP_NUM_THREADS"] = str(work.num_threads)
    return environment


def answer_with_vllm(work: Work) -> Run:
    """vLLM's side, in its own process."""
    import vllm  # pyright: ignore[reportMissingImports]  # not among our requirements

    started = time.perf_counter()
    limits = {"max_num_seqs": work.batch_size} if work.batch_size else {}
    llm = vllm.LLM(
        model=work.checkpoint,
        skip_tokenizer_init=True,
        dtype=work.dtype,
        enable_prefix_caching=True,
        max_model_len=max(len(prompt) for prompt in work.prompts) + work.max_tokens,
        **limits,
    )
    load_s = time.perf_counter() - started

    def answer(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Any]:
        # End tokens are named here and nowhere else: vLLM would add those of generation_config.json.
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            stop_token_ids=list(work.stop_token_ids),
            detokenize=False,
        )
        return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    answer(work.warm_up, NUM_WARM_UP_TOKENS)
    llm.reset_prefix_cache()
    with busy_programs(work.num_busy):
        started = time.perf_counter()
        outputs = answer(work.prompts, work.max_tokens)
        wall_s = time.perf_counter() - started
    num_cached_tokens = sum(output.num_cached_tokens or 0 for output in outputs)
    return Run(
        wall_s=wall_s,
        load_s=load_s,
        output_tokens=[list(output.outputs[0].token_ids) for output in outputs],
        computed_prefill_tokens=sum(len(prompt) for prompt in work.prompts) - num_cached_tokens,
        peak_rss_bytes=tree_peak_rss_bytes(),
        versions={"torch": version("torch"), "vllm": vllm.__version__},
        counters={
            "num_cached_tokens": num_cached_tokens,
            "environment": {name: value for name, value in os.environ.items() if name.startswith("VLLM_")},
        },
    )


def own_peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT_BYTES


def tree_peak_rss_bytes() -> int:
    """The peaks of this process and of those under it, added up; vLLM computes in a process of its own."""
    processes = Path("/proc")
    if not processes.exists():
        return own_peak_rss_bytes()
    parents: dict[int, int] = {}
    peaks: dict[int, int] = {}
    for status in processes.glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # it ended meanwhile
            continue
        parents[int(lines["Pid"])] = int(lines["PPid"])
        peaks[int(lines["Pid"])] = int(lines.get("VmHWM", "0 kB").split()[0]) * 1024
    family = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(peaks.get(process, 0) for process in family)


if __name__ == "__main__":
    # A script's folder comes first on the path; its modules must not stand in for any that vLLM imports.
    sys.path.pop(0)
    _given, _found = map(Path, sys.argv[1:])
    _found.write_text(json.dumps(asdict(answer_with_vllm(Work(**json.loads(_given.read_text()))))))
