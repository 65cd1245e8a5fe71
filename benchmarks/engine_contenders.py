"""Who answers in `benchmarks.engine`: our torch engine, `transformers`, vLLM in an interpreter of its own, and our
`vllm` engine, which feeds the same vLLM in planned order.

Each loads the checkpoint, warms up on foreign prompts, and is timed from the first prompt to the last answer. Run as a
script, this file is vLLM's side: `PYTHON engine_contenders.py WORK.json RUN.json`. So it imports nothing at its top
that another environment may lack.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

TRANSFORMERS_BATCH_SIZE = 8
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


def run_torch(work: Work) -> Run:
    """Our engine, at the level of token ids.

    Raises:
        ContenderFailed: a prompt got an error, or no answer.
    """
    import torch

    from moebeam.model_runner.torch_engine.engine import TorchEngine

    _set_threads(work.num_threads)
    started = time.perf_counter()
    engine = TorchEngine.load(
        work.checkpoint,
        dtype=work.dtype,
        device=work.device,
        batch_size=work.batch_size,
        max_cache_bytes=work.max_cache_bytes,
    )
    load_s = time.perf_counter() - started
    _answer_with_torch(engine, work, work.warm_up, max_tokens=NUM_WARM_UP_TOKENS)
    before = asdict(engine.counters)
    started = time.perf_counter()
    output_tokens = _answer_with_torch(engine, work, work.prompts, max_tokens=work.max_tokens)
    wall_s = time.perf_counter() - started
    counters = counted_since(before, asdict(engine.counters))
    return Run(
        wall_s=wall_s,
        load_s=load_s,
        output_tokens=output_tokens,
        computed_prefill_tokens=counters["num_computed_prefill_tokens"],
        peak_rss_bytes=_own_peak_rss_bytes(),
        versions={"torch": torch.__version__},
        peak_device_bytes=_peak_device_bytes(),
        counters=counters,
    )


def _answer_with_torch(
    engine: Any, work: Work, prompts: Sequence[Sequence[int]], *, max_tokens: int
) -> list[list[int]]:
    import numpy as np

    from moebeam.model_runner.torch_engine.schedule.sequences import Prompt
    from moebeam.schemas.records import Sampling

    answers: dict[str, list[int]] = {}
    asked = (
        Prompt(
            prompt_id=str(row),
            token_ids=np.asarray(prompt, dtype=np.int32),
            max_tokens=max_tokens,
            sampling=Sampling(max_tokens=max_tokens),
            stop_token_ids=frozenset(work.stop_token_ids),
        )
        for row, prompt in enumerate(prompts)
    )
    for finished in engine.run(asked):
        if finished.error is not None:
            raise ContenderFailed(f"prompt {finished.prompt_id}: {type(finished.error).__name__}: {finished.error}")
        answers[finished.prompt_id] = list(finished.token_ids)
    missing = [row for row in range(len(prompts)) if str(row) not in answers]
    if missing:
        raise ContenderFailed(f"expected {len(prompts)} answers, found none for prompts {missing[:10]}")
    return [answers[str(row)] for row in range(len(prompts))]


def counted_since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a run added to counters that also counted the warm-up; a peak is what it is."""
    found: dict[str, Any] = {}
    for name, value in after.items():
        if isinstance(value, dict):
            found[name] = counted_since(before.get(name, {}), value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and not name.startswith(("peak", "max")):
            found[name] = value - before.get(name, 0)
        else:
            found[name] = value
    return found


def run_transformers(work: Work) -> Run:
    """`generate`, in batches of prompts of one length: with padding, V4 answers wrongly."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    transformers.utils.logging.disable_progress_bar()
    _set_threads(work.num_threads)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        work.checkpoint, dtype=getattr(torch, work.dtype), experts_implementation="grouped_mm"
    ).to(resolve_device(work.device))
    load_s = time.perf_counter() - started
    # `generate` takes from the model's own settings what a call leaves at None.
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=list(work.stop_token_ids) or None, pad_token_id=0
    )
    batch_size = work.batch_size or TRANSFORMERS_BATCH_SIZE
    _answer_with_transformers(model, work, work.warm_up, NUM_WARM_UP_TOKENS, batch_size)
    started = time.perf_counter()
    output_tokens = _answer_with_transformers(model, work, work.prompts, work.max_tokens, batch_size)
    return Run(
        wall_s=time.perf_counter() - started,
        load_s=load_s,
        output_tokens=output_tokens,
        computed_prefill_tokens=sum(len(prompt) for prompt in work.prompts),
        peak_rss_bytes=_own_peak_rss_bytes(),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        peak_device_bytes=_peak_device_bytes(),
    )


def _answer_with_transformers(
    model: Any, work: Work, prompts: Sequence[Sequence[int]], max_tokens: int, batch_size: int
) -> list[list[int]]:
    import torch

    answers: list[list[int]] = [[] for _ in prompts]
    for rows in equal_batches([len(prompt) for prompt in prompts], batch_size):
        input_ids = torch.tensor([prompts[row] for row in rows], device=model.device)  # (num_rows, num_tokens)
        with torch.inference_mode():
            found = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=max_tokens)
        for row, token_ids in zip(rows, found[:, input_ids.shape[1] :].tolist(), strict=True):
            answers[row] = cut_after_stop(token_ids, work.stop_token_ids)
    return answers


def equal_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows of equal length, at most so many at a time, in their order."""
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(length, []).append(row)
    for rows in by_length.values():
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def cut_after_stop(token_ids: Sequence[int], stop_token_ids: Sequence[int]) -> list[int]:
    """An answer up to its first end token, and with it; what follows is filling."""
    ends = (place + 1 for place, token_id in enumerate(token_ids) if token_id in stop_token_ids)
    return list(token_ids[: next(ends, len(token_ids))])


def resolve_device(device: str) -> Any:
    """The accelerator that torch finds, else the CPU, for `auto`; else the device named."""
    import torch

    if device != "auto":
        return torch.device(device)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _set_threads(num_threads: int) -> None:
    import torch

    if num_threads:
        torch.set_num_threads(num_threads)


def _own_peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT_BYTES


def _peak_device_bytes() -> int | None:
    import torch

    if not torch.accelerator.is_available() or not hasattr(torch.accelerator, "max_memory_allocated"):
        return None
    return torch.accelerator.max_memory_allocated()


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


def run_vllm_runner(work: Work, python: str) -> Run:
    """Our `vllm` engine: vLLM in an interpreter of its own, fed in token order.

    Raises:
        ContenderFailed: a prompt got an error.
        EngineLoadError: vLLM could not be started.
    """
    from moebeam.model_runner.encoding.chat_encoding import load_encoding
    from moebeam.model_runner.vllm_engine.runner import VllmRunner
    from tests.support.engine_configs import engine_config

    os.environ.update(vllm_environment(work))
    started = time.perf_counter()
    runner = VllmRunner(
        engine_config("vllm", work.checkpoint, "benchmark", "", encoding="deepseek_v3_2"),
        python=python,
        engine_arguments={
            "model": work.checkpoint,
            "skip_tokenizer_init": True,
            "dtype": work.dtype,
            "enable_prefix_caching": True,
            "max_model_len": max(len(prompt) for prompt in work.prompts) + work.max_tokens,
            **({"max_num_seqs": work.batch_size} if work.batch_size else {}),
        },
        tokenizer=_spelling_tokenizer(work.checkpoint),
        encoding=load_encoding(work.checkpoint, "deepseek_v3_2"),
        end_token_ids=work.stop_token_ids,
    )
    try:
        load_s = time.perf_counter() - started
        _answer_with_runner(runner, work.warm_up, NUM_WARM_UP_TOKENS)
        started = time.perf_counter()
        completions = _answer_with_runner(runner, work.prompts, work.max_tokens)
        wall_s = time.perf_counter() - started
        peak_rss_bytes = _tree_peak_rss_bytes()
    finally:
        runner.close()
    num_cached_tokens = sum(completion.usage.cached_tokens or 0 for completion in completions)
    return Run(
        wall_s=wall_s,
        load_s=load_s,
        output_tokens=[[int(word) for word in completion.text.split()] for completion in completions],
        computed_prefill_tokens=sum(len(prompt) for prompt in work.prompts) - num_cached_tokens,
        peak_rss_bytes=peak_rss_bytes,
        versions={"torch": version("torch")},
        counters={"num_cached_tokens": num_cached_tokens},
    )


def _answer_with_runner(runner: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Any]:
    import numpy as np

    from moebeam.schemas.records import Request, Sampling

    asked = (
        Request(str(row), np.asarray(prompt, dtype=np.int32), (), Sampling(max_tokens=max_tokens))
        for row, prompt in enumerate(prompts)
    )
    answers = {completion.request_id: completion for completion in runner.generate(asked)}
    for request_id, completion in answers.items():
        if completion.error is not None:
            raise ContenderFailed(f"prompt {request_id}: {type(completion.error).__name__}: {completion.error}")
    return [answers[str(row)] for row in range(len(prompts))]


def _spelling_tokenizer(checkpoint: str) -> Any:
    """Writes a token as its number, so that the tokens of a text can be told."""
    from tokenizers import Tokenizer, models

    vocab_size = json.loads((Path(checkpoint) / "config.json").read_text())["vocab_size"]
    return Tokenizer(models.WordLevel({str(token_id): token_id for token_id in range(vocab_size)}, unk_token="0"))


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
    started = time.perf_counter()
    outputs = answer(work.prompts, work.max_tokens)
    wall_s = time.perf_counter() - started
    num_cached_tokens = sum(output.num_cached_tokens or 0 for output in outputs)
    return Run(
        wall_s=wall_s,
        load_s=load_s,
        output_tokens=[list(output.outputs[0].token_ids) for output in outputs],
        computed_prefill_tokens=sum(len(prompt) for prompt in work.prompts) - num_cached_tokens,
        peak_rss_bytes=_tree_peak_rss_bytes(),
        versions={"torch": version("torch"), "vllm": vllm.__version__},
        counters={
            "num_cached_tokens": num_cached_tokens,
            "environment": {name: value for name, value in os.environ.items() if name.startswith("VLLM_")},
        },
    )


def _tree_peak_rss_bytes() -> int:
    """The peaks of this process and of those under it, added up; vLLM computes in a process of its own."""
    processes = Path("/proc")
    if not processes.exists():
        return _own_peak_rss_bytes()
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
