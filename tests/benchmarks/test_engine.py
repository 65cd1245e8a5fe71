"""The engine benchmark at tiny size: what is counted, compared and handed on. No time is asserted."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from benchmarks.engine import __main__ as engine
from benchmarks.engine import bound as engine_bound
from benchmarks.engine import contenders, vllm_contender
from benchmarks.engine import work as engine_work
from benchmarks.engine.vllm_contender import ContenderFailed, Run, Work
from moebeam.model_runner.torch_engine.schedule.sequences import Finished, Prompt
from moebeam.schemas.errors import EngineFailed
from tests.support.models.engine_models import NUM_TREE_TOKENS, PROMPTS, v3_config, v4_config


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class StandInCounters:
    """Counters that go on from run to run, as the engine's do."""

    num_tree_tokens: int = 0
    num_computed_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    peak_cache_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"extend": 0.0})


class StandInEngine:
    """Says the prompt's length, then counts on; answers backwards, and fails for a prompt of 99."""

    def __init__(self) -> None:
        self.counters = StandInCounters()
        self.settings: dict[str, Any] = {}

    @classmethod
    def load(cls, path: str, **settings: Any) -> "StandInEngine":
        loaded = cls()
        loaded.settings = {"path": path, **settings}
        return loaded

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Finished]:
        for prompt in reversed(list(prompts)):
            self.counters.num_computed_prefill_tokens += prompt.num_tokens
            self.counters.seconds["extend"] += 0.5
            self.counters.peak_cache_bytes = max(self.counters.peak_cache_bytes, 1000)
            if prompt.token_ids[0] == 99:
                yield Finished(prompt.prompt_id, [], "error", error=EngineFailed("no"))
            elif prompt.token_ids[0] != 98:
                answer = [prompt.num_tokens + place for place in range(prompt.max_tokens)]
                yield Finished(prompt.prompt_id, answer, "length")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("moebeam.model_runner.torch_engine.engine")
    module.TorchEngine = StandInEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moebeam.model_runner.torch_engine.engine", module)


@pytest.mark.usefixtures("stand_in")
def test_torch_run_counts_itself_and_not_its_warm_up(work: Work) -> None:
    run = contenders.run_torch(work)
    assert run.output_tokens == [[len(prompt) + place for place in range(5)] for prompt in PROMPTS]
    assert run.computed_prefill_tokens == sum(map(len, PROMPTS))
    assert run.counters["seconds"] == {"extend": 0.5 * len(PROMPTS)}
    assert run.counters["peak_cache_bytes"] == 1000
    assert run.peak_rss_bytes > 10 << 20


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("token", "message"), [(99, "prompt 1: EngineFailed: no"), (98, "none for prompts .1.")])
def test_prompt_without_an_answer_stops_the_run(token: int, message: str, work: Work) -> None:
    broken = Work(work.checkpoint, [[5], [token], [6]], work.warm_up, max_tokens=2)
    with pytest.raises(ContenderFailed, match=message):
        contenders.run_torch(broken)


def test_transformers_says_in_batches_what_it_says_alone(work: Work) -> None:
    run = contenders.run_transformers(work)
    model = AutoModelForCausalLM.from_pretrained(work.checkpoint, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, run.output_tokens, strict=True):
        input_ids = torch.tensor([prompt])
        for token_id in answer:
            logits = model(input_ids).logits[0, -1]
            assert int(logits.argmax()) == token_id
            input_ids = torch.cat([input_ids, torch.tensor([[token_id]])], dim=1)
    assert {len(answer) for answer in run.output_tokens} == {5}
    assert len({tuple(answer) for answer in run.output_tokens}) > 1
    assert run.computed_prefill_tokens == sum(map(len, PROMPTS))


def test_end_token_ends_an_answer_only_where_it_is_named(checkpoint: str, tmp_path: Path) -> None:
    """The checkpoint's own end token is one that the answers hold."""
    free = contenders.run_transformers(Work(checkpoint, PROMPTS, [[30, 31]], max_tokens=5))
    end = free.output_tokens[0][2]
    engine_work.save_checkpoint(v4_config(eos_token_id=end), tmp_path)
    assert engine.eos_token_ids(str(tmp_path)) == (end,)
    ignored = contenders.run_transformers(Work(str(tmp_path), PROMPTS, [[30, 31]], max_tokens=5))
    ended = contenders.run_transformers(Work(str(tmp_path), PROMPTS, [[30, 31]], max_tokens=5, stop_token_ids=(end,)))
    assert ignored.output_tokens == free.output_tokens
    assert ended.output_tokens == [
        answer[: answer.index(end) + 1] if end in answer else answer for answer in free.output_tokens
    ]


def test_batches_hold_prompts_of_one_length() -> None:
    assert list(contenders.equal_batches([3, 2, 3, 3, 2], 2)) == [[0, 2], [3], [1, 4]]


FAKE_VLLM = """
import os
__version__ = "0.0"

class SamplingParams:
    def __init__(self, **settings):
        self.settings = settings

class Output:
    def __init__(self, token_ids, num_cached_tokens):
        self.token_ids, self.num_cached_tokens, self.outputs = token_ids, num_cached_tokens, [self]

class LLM:
    def __init__(self, **settings):
        assert settings["skip_tokenizer_init"] and settings["enable_prefix_caching"], settings
        assert (settings["max_model_len"], settings["max_num_seqs"]) == (11, 7), settings
        self.is_cache_clean = True

    def generate(self, prompts, params, use_tqdm):
        assert params.settings["ignore_eos"] and params.settings["stop_token_ids"] == [1]
        assert self.is_cache_clean
        self.is_cache_clean = False
        num_tokens = params.settings["max_tokens"]
        print("noise on stdout", os.environ["VLLM_CPU_KVCACHE_SPACE"])
        return [Output([len(prompt["prompt_token_ids"])] * num_tokens, 1) for prompt in prompts]

    def reset_prefix_cache(self):
        self.is_cache_clean = True
"""


@pytest.fixture
def vllm_work(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Work(work.checkpoint, PROMPTS, [[30, 31]], max_tokens=5, stop_token_ids=(1,), batch_size=7)


def test_vllm_answers_from_an_interpreter_of_its_own(vllm_work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    run = vllm_contender.run_vllm(vllm_work, sys.executable)
    assert run.output_tokens == [[len(prompt)] * 5 for prompt in PROMPTS]
    assert run.computed_prefill_tokens == sum(map(len, PROMPTS)) - len(PROMPTS)
    assert run.versions["vllm"] == "0.0"
    assert run.counters["environment"]["VLLM_MLA_DISABLE"] == "1"
    assert run.peak_rss_bytes > 1 << 20


def test_failing_vllm_is_quoted(vllm_work: Work, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("raise SystemExit('no AVX512')")
    with pytest.raises(ContenderFailed, match="no AVX512"):
        vllm_contender.run_vllm(vllm_work, sys.executable)
    with pytest.raises(ContenderFailed, match="/nowhere/python: expected an interpreter"):
        vllm_contender.run_vllm(vllm_work, "/nowhere/python")


def test_cache_of_vllm_is_given_in_whole_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    bare = {"checkpoint": "c", "prompts": PROMPTS, "warm_up": PROMPTS, "max_tokens": 1}
    space = "VLLM_CPU_KVCACHE_SPACE"
    assert vllm_contender.vllm_environment(Work(**bare))[space] == "2"
    assert vllm_contender.vllm_environment(Work(**bare, max_cache_bytes=3 << 30))[space] == "3"
    with pytest.raises(ContenderFailed, match="whole GiB"):
        vllm_contender.vllm_environment(Work(**bare, max_cache_bytes=(1 << 30) + 1))


@pytest.fixture
def quick_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_bound, "_MEASURE_S", 0.001)
    monkeypatch.setattr(engine_bound, "_SHAPES", ((16, 8, 24),))


@pytest.mark.usefixtures("stand_in", "quick_rate")
@pytest.mark.parametrize("order", engine.ORDERS)
def test_result_holds_answers_in_input_order_and_the_bound(
    order: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine_work.write_prompts(tmp_path / "prompts.json", PROMPTS)
    command = ["--engine", "torch", "--checkpoint", checkpoint, "--prompts", str(tmp_path / "prompts.json")]
    command += ["--max-tokens", "3", "--dtype", "float32", "--ignore-eos", "--json", str(tmp_path / "out.json")]
    assert engine.main([*command, "--order", order, "--threads", "1", "--busy", "1"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["output_tokens"] == [[len(prompt) + place for place in range(3)] for prompt in PROMPTS]
    assert found["tree_tokens"] == NUM_TREE_TOKENS
    assert found["computed_prefill_tokens"] == sum(map(len, PROMPTS))
    assert found["flops"]["num_fed_tokens"] == 2 * len(PROMPTS)
    assert found["bound_s"] == pytest.approx(found["flops"]["total"] / found["gemm"]["flops_per_s"])
    assert found["time_over_bound"] == pytest.approx(found["wall_s"] / found["bound_s"])
    assert found["rows_per_s"] == pytest.approx(len(PROMPTS) / found["wall_s"])
    assert found["peak_rss_bytes"] > 0
    assert found["options"]["num_busy"] == 1
    shown = capsys.readouterr().out
    assert "9 in the tree, 16 in prompts; computed / tree 1.778" in shown
    assert "; 1 busy programs were started beside it" in shown


def test_busy_programs_run_inside_the_block_alone() -> None:
    before = set(psutil.Process().children())
    with vllm_contender.busy_programs(2):
        started = set(psutil.Process().children()) - before
        assert len(started) == 2
    assert not any(program.is_running() for program in started)


def test_order_of_feeding_is_as_given_or_by_tokens() -> None:
    assert engine.feeding_order(PROMPTS, "given") == [0, 1, 2, 3]
    assert engine.feeding_order(PROMPTS, "sorted") == [0, 3, 1, 2]


def test_answers_of_no_token_stop_the_benchmark(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(1.0, 1.0, [[1], [], [1], [1]], 1, 1, {})
    monkeypatch.setattr(engine, "run_transformers", lambda work: run)
    options = engine.Options("transformers", "c", Path("p"), 1, "float32", True, None, 0, 0, "auto", 0, "given")
    with pytest.raises(ContenderFailed, match="expected 4 answers, found 4, of which 1 hold no token"):
        engine.run_contender(options, work)


def result(name: str, rows_per_s: float, output_tokens: list[list[int]], digest: str = "a") -> dict[str, Any]:
    return {
        "engine": name,
        "rows_per_s": rows_per_s,
        "computed_prefill_tokens": 9,
        "time_over_bound": 2.0,
        "prompts_sha256": digest,
        "output_tokens": output_tokens,
    }


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([[1, 2, 3], [4]], "2.50 times the rows/s; identical tokens"),
        ([[1, 2, 4], [4]], "2.50 times the rows/s; 1 of 2 rows differ, the first after 2 equal tokens"),
        ([[1, 2, 4], []], "2.50 times the rows/s; 2 of 2 rows differ, the first after 0 equal tokens"),
    ],
)
def test_results_are_compared_row_by_row(
    answers: list[list[int]], verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    paths[0].write_text(json.dumps(result("torch", 5.0, [[1, 2, 3], [4]])))
    paths[1].write_text(json.dumps(result("vllm", 2.0, answers)))
    assert engine.main(["--compare", *map(str, paths)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == verdict


def test_results_of_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        engine.compare_lines(result("torch", 5.0, [[1]]), result("vllm", 2.0, [[1]], digest="b"))


def test_command_makes_checkpoints_and_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "reference_config", lambda layout: {"v3": v3_config, "v4": v4_config}[layout]())
    folder, file = tmp_path / "v3", tmp_path / "prompts.json"
    assert engine.main(["--make", "v3", str(folder), "--make-prompts", "unshared", str(file)]) == 0
    assert json.loads((folder / "config.json").read_text())["model_type"] == "deepseek_v3"
    assert len(engine_work.read_prompts(file)) == 32
    assert "32 prompts, 23,040 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "expected --engine, --make"),
        (["--make", "v5", "x"], "expected one of v3, v4, found 'v5'"),
        (["--make-prompts", "big", "x"], "found 'big'"),
        (["--engine", "torch"], "needs --checkpoint and --prompts"),
        (["--engine", "torch", "--checkpoint", "c", "--prompts", "p", "--max-tokens", "0"], "at least 1"),
        (["--engine", "vllm", "--checkpoint", "c", "--prompts", "p", "--device", "cpu"], "--device"),
    ],
)
def test_wrong_commands_are_refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        engine.main(command)
    assert message in capsys.readouterr().err


def test_failure_is_told_in_one_line(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--engine", "torch", "--checkpoint", checkpoint, "--prompts", str(tmp_path / "none.json")]
    assert engine.main(command) == 1
    assert "none.json" in capsys.readouterr().err
