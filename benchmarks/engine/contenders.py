"""Who answers in `benchmarks.engine` beside vLLM itself: our torch engine, `transformers`, and our `vllm` engine, which
feeds vLLM in planned order.

Each loads the checkpoint, warms up on foreign prompts, and is timed from the first prompt to the last answer.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.engine.vllm_contender import (
    NUM_WARM_UP_TOKENS,
    ContenderFailed,
    Run,
    Work,
    busy_programs,
    own_peak_rss_bytes,
    tree_peak_rss_bytes,
    vllm_environment,
)

TRANSFORMERS_BATCH_SIZE = 8

_PEAKS = ("peak", "max")
"""Begin the names of counters that are no sums; seconds by threads have numbers for names."""


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
    with busy_programs(work.num_busy):
        started = time.perf_counter()
        output_tokens = _answer_with_torch(engine, work, work.prompts, max_tokens=work.max_tokens)
        wall_s = time.perf_counter() - started
    counters = counted_since(before, asdict(engine.counters))
    return Run(
        wall_s=wall_s,
        load_s=load_s,
        output_tokens=output_tokens,
        computed_prefill_tokens=counters["num_computed_prefill_tokens"],
        peak_rss_bytes=own_peak_rss_bytes(),
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
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and not str(name).startswith(_PEAKS):
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
    with busy_programs(work.num_busy):
        started = time.perf_counter()
        output_tokens = _answer_with_transformers(model, work, work.prompts, work.max_tokens, batch_size)
        wall_s = time.perf_counter() - started
    return Run(
        wall_s=wall_s,
        load_s=load_s,
        output_tokens=output_tokens,
        computed_prefill_tokens=sum(len(prompt) for prompt in work.prompts),
        peak_rss_bytes=own_peak_rss_bytes(),
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


def _peak_device_bytes() -> int | None:
    import torch

    if not torch.accelerator.is_available() or not hasattr(torch.accelerator, "max_memory_allocated"):
        return None
    return torch.accelerator.max_memory_allocated()


def run_vllm_runner(work: Work, python: str) -> Run:
    """Our `vllm` engine: vLLM in an interpreter of its own, fed in token order.

    Raises:
        ContenderFailed: a prompt got an error.
        EngineLoadError: vLLM could not be started.
    """
    from moebeam.model_runner.encoding.chat_encoding import load_encoding
    from moebeam.model_runner.vllm_engine.engine_arguments import EngineArguments
    from moebeam.model_runner.vllm_engine.runner import VllmRunner
    from tests.support.engines.engine_configs import engine_config

    os.environ.update(vllm_environment(work))
    started = time.perf_counter()
    runner = VllmRunner(
        engine_config("vllm", work.checkpoint, "benchmark", "", encoding="deepseek_v3_2"),
        python=python,
        engine_arguments=EngineArguments(
            {
                "model": work.checkpoint,
                "skip_tokenizer_init": True,
                "dtype": work.dtype,
                "enable_prefix_caching": True,
                "max_model_len": max(len(prompt) for prompt in work.prompts) + work.max_tokens,
                **({"max_num_seqs": work.batch_size} if work.batch_size else {}),
            },
            named={},
        ),
        tokenizer=_spelling_tokenizer(work.checkpoint),
        encoding=load_encoding(work.checkpoint, "deepseek_v3_2"),
        end_token_ids=work.stop_token_ids,
    )
    try:
        load_s = time.perf_counter() - started
        _answer_with_runner(runner, work.warm_up, NUM_WARM_UP_TOKENS)
        with busy_programs(work.num_busy):
            started = time.perf_counter()
            completions = _answer_with_runner(runner, work.prompts, work.max_tokens)
            wall_s = time.perf_counter() - started
        peak_rss_bytes = tree_peak_rss_bytes()
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
