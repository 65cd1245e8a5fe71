"""The worker that runs beside vLLM, over a module that stands in for vLLM."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from moebeam.model_runner.vllm_engine import process as vllm_process

FAKE_VLLM = {
    "vllm/__init__.py": """
        import sys
        from dataclasses import dataclass
        from types import SimpleNamespace as Is

        print("noise on standard output")
        if any(path.rstrip("/").endswith("model_runner") for path in sys.path):
            raise RuntimeError("modules of moebeam are in vLLM's way")

        __version__ = "9.9"

        @dataclass
        class EngineArgs:
            model: str
            speed: int = 0
            worker_extension_cls: str = ""

        class LLMEngine:
            model_config = Is(max_model_len=9, get_vocab_size=lambda: 8, dtype="torch.float32", quantization=None)
            vllm_config = Is(
                scheduler_config=Is(max_num_seqs=7),
                cache_config=Is(block_size=16, cache_dtype="auto"),
                speculative_config=None,
            )
            engine_core = Is(shutdown=lambda: print("shutdown", file=sys.stderr))

            @classmethod
            def from_engine_args(cls, arguments):
                if arguments.model == "broken":
                    raise ValueError("no such model")
                engine = cls()
                engine.extension = arguments.worker_extension_cls
                engine.running = {}
                return engine

            def collective_rpc(self, method):
                module, _, name = self.extension.partition(".")
                specs = [Is(block_size=16), Is(block_size=3), Is(block_size=5, prefix_cacheable=False)]
                worker = __import__(module).__dict__[name]()
                worker.model_runner = Is(kv_cache_config=Is(kv_cache_groups=[Is(kv_cache_spec=spec) for spec in specs]))
                worker.vllm_config = self.vllm_config
                return [getattr(worker, method)()]

            def has_unfinished_requests(self):
                return bool(self.running)

            def add_request(self, request_id, prompt, params):
                if prompt["prompt_token_ids"] == [0]:
                    raise KeyError("no")
                self.running[request_id] = (prompt, params)

            def abort_request(self, request_ids):
                for request_id in request_ids:
                    self.running.pop(request_id, None)

            def step(self):
                print("noise of a step")
                from vllm.v1.engine.exceptions import EngineDeadError
                if any(prompt["prompt_token_ids"] == [1] for prompt, _ in self.running.values()):
                    raise EngineDeadError("dead")
                outputs = []
                for request_id, (prompt, params) in list(self.running.items()):
                    values = params.values
                    is_last = values["output_kind"] == "final" or prompt.setdefault("seen", 0) > 0
                    prompt["seen"] = 1
                    likely = [{5: Is(logprob=-0.5), 6: Is(logprob=-9.0)}]
                    logprobs = None if values["logprobs"] is None else likely
                    answer = Is(token_ids=[5], logprobs=logprobs, finish_reason="length" if is_last else None)
                    outputs.append(Is(request_id=request_id, outputs=[answer], num_cached_tokens=2))
                    if is_last:
                        self.running.pop(request_id)
                        print(sorted(prompt), values["structured_outputs"], file=sys.stderr)
                return outputs
    """,
    "vllm/sampling_params.py": """
        class RequestOutputKind:
            DELTA, FINAL_ONLY = "delta", "final"

        class SamplingParams:
            def __init__(self, **values):
                assert values["ignore_eos"] and not values["detokenize"]
                self.values = values

        def StructuredOutputsParams(**values):
            return values
    """,
    "vllm/platforms.py": """
        from types import SimpleNamespace
        current_platform = SimpleNamespace(
            device_type="tin", is_rocm=lambda: False, is_xpu=lambda: False, is_cuda=lambda: False
        )
    """,
    "vllm/v1/__init__.py": "",
    "vllm/v1/engine/__init__.py": "",
    "vllm/v1/engine/exceptions.py": "class EngineDeadError(Exception): pass",
}


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Worker"]:
    """Starts the worker's script over a scripted vLLM."""
    for name, text in FAKE_VLLM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = Worker()
    yield started
    started.end()


class Worker:
    """The worker's script, spoken to as the runner does."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(vllm_process.WORKER_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def say(self, **line: object) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(line) + "\n")
        self.popen.stdin.flush()

    def load(self, engine: dict[str, object]) -> None:
        named = {"unknown": "[model.engine_args]"}
        self.say(type="load", engine=engine, named=named, batch_invariant="auto", adapters={})

    def ask(self, ask_id: str, token_ids: Sequence[int], **values: object) -> None:
        line: dict[str, object] = {"cache_salt": None, "sampling": {"logprobs": 0}, "grammar": None}
        line |= {"adapter": None, "rank": None}
        self.say(**(line | {"type": "ask", "id": ask_id, "prompt_token_ids": token_ids, "is_streamed": False} | values))

    def hear(self) -> Any:
        assert self.popen.stdout is not None
        return json.loads(self.popen.stdout.readline())

    def end(self) -> tuple[int, str]:
        """Close the worker's input; its exit status and its log."""
        if self.popen.returncode is None:
            _, self.log = self.popen.communicate(timeout=60)
        return self.popen.returncode, self.log


def test_worker_keeps_its_lines_apart_from_what_vllm_prints(worker: Worker) -> None:
    worker.load({"model": "m"})
    ready = {"type": "ready", "max_model_len": 9, "vocab_size": 8, "max_num_seqs": 7, "device": "tin"}
    ready |= {"dtype": "float32", "is_quantized": False, "is_batch_invariant": False, "version": "9.9"}
    cache = {"block_size": 16, "hit_unit": 48, "num_dropped_units": 0, "num_replayed_tokens": 0}
    assert worker.hear() == ready | cache
    worker.ask("a", [3], sampling={"logprobs": 1}, cache_salt="s")
    line = {"type": "tokens", "id": "a", "token_ids": [5], "cached_tokens": 2}
    likeliest = [[[5, -0.5], [6, -9.0]]]
    assert worker.hear() == line | {"logprobs": [-0.5], "top_logprobs": likeliest, "finish_reason": "length"}
    worker.ask("b", [3], is_streamed=True, sampling={"logprobs": None})
    assert worker.hear() == line | {"id": "b", "logprobs": None, "top_logprobs": None, "finish_reason": None}
    assert worker.hear()["finish_reason"] == "length"
    code, log = worker.end()
    assert code == 0
    assert "noise on standard output" in log
    assert "noise of a step" in log
    assert "['cache_salt', 'prompt_token_ids', 'seen'] None" in log
    assert log.rstrip().endswith("shutdown")


def test_worker_refuses_one_request_and_goes_on(worker: Worker) -> None:
    worker.load({"model": "m"})
    worker.hear()
    worker.ask("a", [0])
    assert worker.hear() == {"type": "refused", "id": "a", "error": "KeyError: 'no'"}
    worker.ask("b", [3], grammar='{"grammars": [{"json_schema": {"b": 1, "a": 2}}]}')
    assert worker.hear()["type"] == "tokens"
    worker.ask("c", [3], grammar='{"grammars": [{"lark_grammar": "start: x", "name": "n"}]}')
    assert worker.hear()["type"] == "tokens"
    for grammar in ("{}", "no", "[]", '{"grammars": [{"json_schema": {}}, {"json_schema": {}}]}'):
        worker.ask("d", [3], grammar=grammar)
        assert worker.hear()["type"] == "refused"
    log = worker.end()[1]
    assert """{'json': '{"b": 1, "a": 2}'}""" in log
    assert "{'grammar': 'start: x'}" in log


def test_worker_says_why_it_ends(worker: Worker) -> None:
    worker.load({"model": "m"})
    worker.hear()
    worker.ask("a", [1])
    assert worker.hear() == {"type": "broken", "error": "EngineDeadError: dead", "was_batch_invariant": False}
    assert worker.end()[0] == 1


@pytest.mark.parametrize("engine", [{"model": "broken"}, {"model": "m", "unknown": 1}])
def test_worker_that_cannot_load_says_why(worker: Worker, engine: dict[str, object]) -> None:
    worker.load(engine)
    line = worker.hear()
    assert line["type"] == "broken"
    assert line["error"].startswith(
        (
            "ValueError: no such model",
            "ValueError: [model.engine_args]: vLLM 9.9 has no argument 'unknown'",
        )
    )
    assert worker.end()[0] == 1
