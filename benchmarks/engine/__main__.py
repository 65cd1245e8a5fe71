"""An engine on a checkpoint and a file of prompts: `python -m benchmarks.engine --engine torch --checkpoint DIR ...`.

Our engine, `transformers`, vLLM and our `vllm` engine (`vllm-runner`) do the same work, each in a run of its own, and
are held against the least time that any engine could need (`benchmarks.engine.bound`). The same command makes reference
work (`--make`, `--make-prompts`) and compares two results (`--compare`).
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine.contenders import resolve_device, run_torch, run_transformers, run_vllm_runner
from benchmarks.engine.vllm_contender import ContenderFailed, Run, Work, run_vllm
from benchmarks.engine.work import (
    LAYOUTS,
    PROMPT_SETS,
    Prompts,
    foreign_prompts,
    make_prompts,
    read_prompts,
    reference_config,
    save_checkpoint,
    write_prompts,
)
from benchmarks.pipeline.__main__ import QuietClock
from benchmarks.report import machine_facts
from moebeam.model_runner.torch_engine.options import TorchOptions

ENGINES = ("torch", "transformers", "vllm", "vllm-runner")
ORDERS = ("given", "sorted")


@dataclass(frozen=True, slots=True)
class Options:
    """What is to be measured; see `main`."""

    engine: str
    checkpoint: str
    prompts: Path
    max_tokens: int
    dtype: str
    is_eos_ignored: bool
    python: str | None
    max_cache_bytes: int
    batch_size: int
    device: str
    num_threads: int
    order: str
    num_busy: int = 0


def run_benchmark(options: Options) -> dict[str, Any]:
    """Let one engine do the work, and count what it needed.

    Raises:
        ContenderFailed: the engine failed.
        ValueError: the prompts' file, or the layout of the checkpoint, is not what it should be.
    """
    if options.engine == "torch" and "torch" not in sys.modules:
        # As a job does before it loads the engine; torch reads them while it is imported, which `transformers` does.
        os.environ.update(TorchOptions.choose_library_environment(os.environ))
    from transformers import AutoConfig

    from benchmarks.engine.bound import count_work, model_flops

    prompts = read_prompts(options.prompts)
    config = AutoConfig.from_pretrained(options.checkpoint)
    flops = model_flops(config)
    order = feeding_order(prompts, options.order)
    stop_token_ids = () if options.is_eos_ignored else eos_token_ids(options.checkpoint)
    work = Work(
        checkpoint=options.checkpoint,
        prompts=[prompts[row] for row in order],
        warm_up=foreign_prompts(prompts, vocab_size=config.vocab_size),
        max_tokens=options.max_tokens,
        dtype=options.dtype,
        stop_token_ids=stop_token_ids,
        device=options.device,
        batch_size=options.batch_size,
        max_cache_bytes=options.max_cache_bytes,
        num_threads=options.num_threads,
        num_busy=options.num_busy,
    )
    quiet = QuietClock()
    run = run_contender(options, work)
    others_cpu_s, total_s = quiet.others_cpu_s(), quiet.wall_s()
    by_row = dict(zip(order, run.output_tokens, strict=True))
    output_tokens = [by_row[row] for row in range(len(prompts))]
    needed = count_work(flops, prompts, [len(answer) for answer in output_tokens])
    rate = _gemm_rate(options)
    bound_s = needed.total / rate["flops_per_s"]
    return {
        "benchmark": "engine",
        "engine": options.engine,
        "versions": run.versions,
        "rows_per_s": len(prompts) / run.wall_s,
        "wall_s": run.wall_s,
        "load_s": run.load_s,
        "num_rows": len(prompts),
        "prompt_tokens": sum(len(prompt) for prompt in prompts),
        "tree_tokens": needed.num_tree_tokens,
        "computed_prefill_tokens": run.computed_prefill_tokens,
        "peak_rss_bytes": run.peak_rss_bytes,
        "peak_device_bytes": run.peak_device_bytes,
        "bound_s": bound_s,
        "time_over_bound": run.wall_s / bound_s,
        "flops": {**asdict(needed), "total": needed.total},
        "gemm": rate,
        "counters": run.counters,
        "others_busy_cores": None if others_cpu_s is None else others_cpu_s / total_s,
        "options": {**asdict(options), "prompts": str(options.prompts)},
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "machine": machine_facts(),
        "output_tokens": output_tokens,
    }


def run_contender(options: Options, work: Work) -> Run:
    """Hand the work to the engine asked for.

    Raises:
        ContenderFailed: it failed, or left a row without an answer.
    """
    if options.engine in ("vllm", "vllm-runner"):
        runs = {"vllm": run_vllm, "vllm-runner": run_vllm_runner}
        run = runs[options.engine](work, options.python or sys.executable)
    else:
        run = {"torch": run_torch, "transformers": run_transformers}[options.engine](work)
    empty = [row for row, answer in enumerate(run.output_tokens) if not answer]
    if len(run.output_tokens) != len(work.prompts) or empty:
        raise ContenderFailed(
            f"{options.engine}: expected {len(work.prompts)} answers, found {len(run.output_tokens)}, "
            f"of which {len(empty)} hold no token"
        )
    return run


def feeding_order(prompts: Prompts, order: str) -> list[int]:
    """The rows in the order in which an engine gets them: as given, or so that neighbours share most."""
    rows = range(len(prompts))
    return list(rows) if order == "given" else sorted(rows, key=prompts.__getitem__)


def eos_token_ids(checkpoint: str) -> tuple[int, ...]:
    """The end tokens of a checkpoint: what generation_config.json says, else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(checkpoint) / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


def _gemm_rate(options: Options) -> dict[str, Any]:
    """The best GEMM rate of the same process, once the engine's peak of memory is known."""
    import torch

    from benchmarks.engine.bound import gemm_rate

    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    return asdict(gemm_rate(getattr(torch, options.dtype), resolve_device(options.device)))


def result_lines(found: dict[str, Any]) -> list[str]:
    """A result to read."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    gemm, flops = found["gemm"], found["flops"]
    shares = ", ".join(f"{name} {flops[name] / 1e12:.3f}" for name in ("prefill", "decode", "logits", "attention"))
    tree_tokens, computed = found["tree_tokens"], found["computed_prefill_tokens"]
    busy, num_busy = found["others_busy_cores"], found["options"].get("num_busy", 0)
    return [
        f"{found['engine']} ({versions}), {found['options']['dtype']}: {found['num_rows']:,} rows in "
        f"{found['wall_s']:.2f} s, {found['rows_per_s']:.2f} rows/s (loading: {found['load_s']:.1f} s)",
        f"prefill: {computed:,} tokens computed, {tree_tokens:,} in the tree, {found['prompt_tokens']:,} in prompts; "
        f"computed / tree {computed / tree_tokens:.3f}",
        f"bound: {found['bound_s']:.2f} s ({flops['total'] / 1e12:.3f} TFLOP: {shares}; "
        f"{gemm['flops_per_s'] / 1e9:.0f} GFLOP/s by {gemm['path']}); time / bound {found['time_over_bound']:.2f}",
        f"peak memory: {found['peak_rss_bytes'] / (1 << 20):,.0f} MiB"
        + ("" if busy is None else f"; other programs kept {max(0.0, busy):.2f} cores busy")
        + (f"; {num_busy} busy programs were started beside it" if num_busy else ""),
    ]


def compare_lines(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Two results side by side: how many times as fast the first is, and whether both say the same.

    Raises:
        ValueError: they come from different prompts.
    """
    if left["prompts_sha256"] != right["prompts_sha256"]:
        raise ValueError("expected results of the same prompts, found two sets")
    pairs = list(zip(left["output_tokens"], right["output_tokens"], strict=True))
    num_different = sum(first != second for first, second in pairs)
    agreed = [_num_common(first, second) for first, second in pairs if first != second]
    verdict = "identical tokens" if not agreed else f"{num_different:,} of {len(pairs):,} rows differ"
    if agreed:
        verdict += f", the first after {min(agreed):,} equal tokens"
    lines = [
        f"{found['engine']:<14}{found['rows_per_s']:>10.2f} rows/s{found['computed_prefill_tokens']:>12,} prefilled"
        f"{found['time_over_bound']:>8.2f} times the bound"
        for found in (left, right)
    ]
    return [*lines, f"{left['rows_per_s'] / right['rows_per_s']:.2f} times the rows/s; {verdict}"]


def _num_common(left: Sequence[int], right: Sequence[int]) -> int:
    differences = (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differences, min(len(left), len(right)))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description="An engine against its bound.")
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--checkpoint", help="folder in Hugging Face form; needs no tokenizer")
    parser.add_argument("--prompts", type=Path, help="JSON: a list of lists of token ids")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--ignore-eos", action="store_true", help="let every answer have all its tokens")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--python", help="interpreter that has vLLM; left out, this one")
    parser.add_argument("--max-cache-bytes", type=int, default=0, help="of the engine's cache; 0: its own default")
    parser.add_argument("--batch-size", type=int, default=0, help="most sequences at once; 0: the engine's own default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own default")
    parser.add_argument("--busy", type=int, default=0, help="programs that keep a core busy each meanwhile")
    parser.add_argument("--order", choices=ORDERS, default="given", help="in which the engine gets the prompts")
    parser.add_argument("--make", nargs=2, metavar=("|".join(LAYOUTS), "DIR"), help="write a reference checkpoint")
    parser.add_argument("--make-prompts", nargs=2, metavar=("|".join(PROMPT_SETS), "FILE"), help="write a prompt set")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("FIRST", "SECOND"), help="files that --json wrote")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, make or compare; 1 if that failed, whatever the figures say."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.make:
        layout, folder = args.make
        if layout not in LAYOUTS:
            parser.error(f"--make: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
        num_parameters = save_checkpoint(reference_config(layout), Path(folder))
        print(f"{folder}: {num_parameters / 1e6:.1f}M parameters")
    if args.make_prompts:
        prompt_set, file = args.make_prompts
        if prompt_set not in PROMPT_SETS:
            parser.error(f"--make-prompts: expected one of {', '.join(PROMPT_SETS)}, found {prompt_set!r}")
        prompts = make_prompts(prompt_set)
        write_prompts(Path(file), prompts)
        print(f"{file}: {len(prompts):,} prompts, {sum(map(len, prompts)):,} tokens")
    try:
        if args.engine:
            _measure(args, parser)
        if args.compare:
            print("\n".join(compare_lines(*(json.loads(path.read_text()) for path in args.compare))))
    except (ContenderFailed, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if not (args.make or args.make_prompts or args.engine or args.compare):
        parser.error("expected --engine, --make, --make-prompts or --compare")
    return 0


def _measure(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.checkpoint is None or args.prompts is None:
        parser.error("--engine needs --checkpoint and --prompts")
    if args.max_tokens < 1:
        parser.error(f"--max-tokens: expected at least 1, found {args.max_tokens}")
    if args.engine in ("vllm", "vllm-runner") and args.device != "auto":
        parser.error("--device: vLLM computes where it was built for")
    options = Options(
        engine=args.engine,
        checkpoint=args.checkpoint,
        prompts=args.prompts,
        max_tokens=args.max_tokens,
        dtype=args.dtype,
        is_eos_ignored=args.ignore_eos,
        python=args.python,
        max_cache_bytes=args.max_cache_bytes,
        batch_size=args.batch_size,
        device=args.device,
        num_threads=args.threads,
        order=args.order,
        num_busy=args.busy,
    )
    found = run_benchmark(options)
    print("\n".join(result_lines(found)))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    sys.exit(main())
