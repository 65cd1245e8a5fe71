"""The vLLM engine: against a scripted worker, the worker against a scripted vLLM, and both against the real one.

The real one runs where `MOEBEAM_VLLM_PYTHON` names an interpreter that has it.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moebeam.model_runner.engine_process.process_link import EngineExit
from moebeam.model_runner.prefix_tree import prefix_key
from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.transformers_engine.runner import load_transformers_runner
from moebeam.model_runner.vllm_engine import process as vllm_process
from moebeam.model_runner.vllm_engine import runner as vllm_runner
from moebeam.model_runner.vllm_engine.process import PYTHON_VARIABLE
from moebeam.model_runner.vllm_engine.runner import ARGUMENTS_VARIABLE, VllmRunner, load_vllm_runner
from moebeam.schemas.errors import ContextOverflow, EngineFailed, EngineLoadError
from moebeam.schemas.records import Completion, Request, Sampling, TokenLogprob
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.engine_configs import engine_config
from tests.support.tiny_requests import EOS_ID, request_of

DIE, DIE_ONCE, REFUSE, ABORT, GARBAGE, ENDLESS = 255, 254, 253, 252, 251, 250
"""What the scripted worker does over a prompt whose last token is this; else it answers with the prompt's tokens."""

FAKE_WORKER = """
    import json, os, select, signal, sys

    folder, number = os.environ["FAKE_FOLDER"], len(os.listdir(os.environ["FAKE_FOLDER"]))
    log = open(f"{folder}/{number}.jsonl", "w", buffering=1)
    engine = json.loads(sys.stdin.buffer.raw.readline())["engine"]
    log.write(json.dumps(engine) + "\\n")

    def say(**line):
        os.write(1, json.dumps(line).encode() + b"\\n")

    def tokens(id, token_ids, finish_reason, logprobs=None, cached_tokens=3):
        likely = None if logprobs is None else [[(token_id, -1.0), (65, -2.0)] for token_id in token_ids]
        say(type="tokens", id=id, token_ids=token_ids, logprobs=logprobs, top_logprobs=likely,
            cached_tokens=cached_tokens, finish_reason=finish_reason)

    def answer(ask):
        id, sampling, kind = ask["id"], ask["sampling"], ask["prompt_token_ids"][-1]
        if kind == 255 or (kind == 254 and number == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == 253:
            return say(type="refused", id=id, error="VLLMValidationError: no")
        if kind == 252:
            return tokens(id, [70], "abort")
        if kind == 251:
            return os.write(1, b"no json\\n")
        if kind == 250:
            endless.append(id)
            return
        token_ids = ask["prompt_token_ids"][1:][: sampling["max_tokens"]]
        if 1 in token_ids:
            token_ids = token_ids[: token_ids.index(1) + 1]
        logprobs = None if sampling["logprobs"] is None else [-float(token_id) for token_id in token_ids]
        tokens(id, token_ids, "stop" if token_ids[-1] == 1 else "length", logprobs)

    if "fail" in engine:
        print("line of a log", file=sys.stderr)
        print("(EngineCore) ValueError: the cause", file=sys.stderr)
        say(type="broken", error="RuntimeError: see above")
        sys.exit(1)
    say(type="ready", max_model_len=64, vocab_size=261, max_num_seqs=engine.get("max_num_seqs", 4), device="cpu")
    buffered, asks, endless = b"", [], []
    while True:
        # Whoever asks gets nothing before it has said all that it wants to say.
        if not select.select([0], [], [], 0.02 if endless else 0.1 if asks else None)[0]:
            if asks:
                answer(asks.pop(0))
            for id in endless:
                tokens(id, [75], None)
            continue
        read = os.read(0, 1 << 16)
        if not read:
            log.write('"end"\\n')
            break
        *lines, buffered = (buffered + read).split(b"\\n")
        for line in map(json.loads, lines):
            if line["type"] == "withdraw":
                endless = [id for id in endless if id not in line["ids"]]
                asks = [ask for ask in asks if ask["id"] not in line["ids"]]
            else:
                asks.append(line)
            log.write(json.dumps(line | {"num_unanswered": len(asks)}) + "\\n")
"""


def config_of(path: Path | str, **values: Any) -> EngineConfig:
    return engine_config(**({"engine": "vllm", "path": str(path), "name": "tiny", "revision": "r"} | values))


def request(request_id: str, tokens: Sequence[int], max_tokens: int = 6, **values: Any) -> Request:
    return request_of(request_id, tokens, max_tokens, **values)


def by_id(completions: Iterator[Completion]) -> dict[str, Completion]:
    found = list(completions)
    assert len({completion.request_id for completion in found}) == len(found)
    return {completion.request_id: completion for completion in found}


class Fake:
    """The scripted worker's records, one file for each process in the order of their starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def num_processes(self) -> int:
        return len(list(self.folder.iterdir()))

    def lines(self, number: int = 0) -> list[Any]:
        return [json.loads(line) for line in (self.folder / f"{number}.jsonl").read_text().splitlines()]

    def asks(self, number: int = 0) -> list[Any]:
        return [line for line in self.lines(number)[1:] if line != "end" and line["type"] == "ask"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Lets `load_vllm_runner` start the scripted worker."""
    (script := tmp_path / "worker.py").write_text(textwrap.dedent(FAKE_WORKER))
    (folder := tmp_path / "records").mkdir()
    monkeypatch.setattr(vllm_process, "WORKER_SCRIPT", script)
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    monkeypatch.delenv(ARGUMENTS_VARIABLE, raising=False)
    monkeypatch.setenv("FAKE_FOLDER", str(folder))
    return Fake(folder)


@pytest.fixture
def runner(fake: Fake, tiny_checkpoint: Path) -> Iterator[VllmRunner]:
    loaded = load_vllm_runner(config_of(tiny_checkpoint))
    yield loaded
    loaded.close()


def test_what_is_given_back_is_withdrawn_and_has_no_completion(runner: VllmRunner, fake: Fake) -> None:
    found: list[str] = []
    for completion in runner.generate(request(str(number), [70, 71]) for number in range(30)):
        found.append(completion.request_id)
        runner.give_back()
    assert len(found) == 1
    assert list(runner.generate([request("again", [70])])) == []


def test_requests_are_sent_in_token_order_tenants_apart(runner: VllmRunner, fake: Fake) -> None:
    rng = np.random.default_rng(0)
    requests = [request(str(i), [70, *rng.integers(70, 74, 5)], tenant=("", "a", "b")[i % 3]) for i in range(30)]
    assert len(by_id(runner.generate(requests))) == 30
    expected = sorted(requests, key=lambda one: prefix_key(one.tenant, one.prompt_token_ids))
    asks = fake.asks()
    assert [ask["prompt_token_ids"] for ask in asks] == [one.prompt_token_ids.tolist() for one in expected]
    salts = [ask["cache_salt"] for ask in asks]
    assert [salt is None for salt in salts] == [one.tenant == "" for one in expected]
    assert len(set(zip(salts, (one.tenant for one in expected), strict=True))) == len(set(salts)) == 3
    assert not {"a", "b"} & set(salts)


def test_what_is_in_flight_and_what_is_pulled_ahead_is_bounded(
    fake: Fake, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_runner, "NUM_WINDOW_REQUESTS", 10)
    runner = load_vllm_runner(config_of(tiny_checkpoint, batch_size=2))
    num_pulled = 0

    def source() -> Iterator[Request]:
        nonlocal num_pulled
        for i in range(25):
            num_pulled += 1
            yield request(str(i), [70 + i])

    most_ahead = max(num_pulled - i for i, _ in enumerate(runner.generate(source())))
    runner.close()
    assert most_ahead == 10
    assert max(ask["num_unanswered"] for ask in fake.asks()) == 4
    assert len(fake.asks()) == 25
    # The first window is sent before anything of the second.
    assert {ask["prompt_token_ids"][1] for ask in fake.asks()[:10]} == {70 + i for i in range(10)}


def test_usage_finish_reason_and_logprobs_are_vllms(runner: VllmRunner) -> None:
    whole = request("length", [70, 71, 72], max_tokens=2, logprobs=True)
    ended = request("stop", [70, EOS_ID, 72], max_tokens=3)
    found = by_id(runner.generate([whole, ended]))
    one, other = found["length"], found["stop"]
    assert (one.finish_reason, one.logprobs, one.error) == ("length", (-70.0, -71.0), None)
    assert (one.usage.prompt_tokens, one.usage.completion_tokens, one.usage.cached_tokens) == (4, 2, 3)
    assert one.text == runner._tokenizer.decode([70, 71])
    assert (other.finish_reason, other.logprobs, other.usage.completion_tokens) == ("stop", None, 2)
    assert other.text == runner._tokenizer.decode([70])
    assert (one.provider, one.model, one.model_revision) == ("local", "tiny", "r")
    assert one.latency_ms > 0


def test_sampling_is_sent_as_asked_and_seeds_depend_on_the_row_and_its_sample(runner: VllmRunner, fake: Fake) -> None:
    sampled = replace(request("a", [70], temperature=0.7, top_p=0.9, min_p=0.1, grammar="{}"), row_id="row")
    others = [
        replace(sampled, request_id="b", sample=1),
        replace(sampled, request_id="c", sampling=Sampling(6, 0.7, seed=-1)),
        request("d", [71], logprobs=True),
        replace(sampled, request_id="e", attempt=2),
        replace(sampled, request_id="f", row_id="other"),
    ]
    by_id(runner.generate([sampled, *others]))
    first, second, seeded, same, other, greedy = fake.asks()
    assert first["sampling"] | {"seed": None} == {
        "max_tokens": 6,
        "temperature": 0.7,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": None,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "logprobs": None,
        "stop_token_ids": [EOS_ID],
    }
    assert (first["grammar"], greedy["grammar"], greedy["sampling"]["logprobs"]) == ("{}", None, 0)
    assert first["sampling"]["seed"] == same["sampling"]["seed"] != second["sampling"]["seed"]
    assert len({ask["sampling"]["seed"] for ask in (first, second, seeded, other)}) == 4
    assert greedy["sampling"]["seed"] is None


def test_penalties_and_likely_tokens_are_vllms(runner: VllmRunner, fake: Fake) -> None:
    asked = {"frequency_penalty": 0.5, "presence_penalty": -1.0, "logprobs": True}
    found = by_id(
        runner.generate(
            [
                request("one", [70, 71, 72], max_tokens=2, top_logprobs=1, **asked),
                request("two", [70, 71, 72], max_tokens=2, top_logprobs=2, **asked),
                request("none", [70, 71, 72], max_tokens=2, logprobs=True),
            ]
        )
    )
    decode = runner._tokenizer.decode
    assert found["none"].top_logprobs is None
    assert found["one"].top_logprobs == tuple((TokenLogprob(decode([token_id]), -1.0),) for token_id in (70, 71))
    assert found["two"].top_logprobs is not None
    assert found["two"].top_logprobs[0] == (TokenLogprob(decode([70]), -1.0), TokenLogprob(decode([65]), -2.0))
    sent = [ask["sampling"] for ask in fake.asks()]
    assert sorted(sampling["logprobs"] for sampling in sent) == [0, 1, 2]
    assert sorted(sampling["frequency_penalty"] for sampling in sent) == [0.0, 0.5, 0.5]


def test_text_ends_before_a_stop_string_and_the_rest_is_withdrawn(runner: VllmRunner, fake: Fake) -> None:
    letter = runner._tokenizer.decode([75])
    found = by_id(
        runner.generate(
            [
                request("endless", [ENDLESS], max_tokens=50, stop=("never", letter * 3)),
                request("cut", [70, 71, 72, 73], stop=(runner._tokenizer.decode([72, 73]),)),
                request("whole", [70, 71, 72, 73], max_tokens=3, stop=("never",)),
            ]
        )
    )
    assert (found["endless"].text, found["endless"].finish_reason) == ("", "stop")
    assert found["endless"].usage.completion_tokens == 3
    assert (found["cut"].text, found["cut"].finish_reason) == (runner._tokenizer.decode([70, 71]), "stop")
    assert found["cut"].usage.completion_tokens == 4
    assert (found["whole"].text, found["whole"].finish_reason) == (runner._tokenizer.decode([70, 71, 72]), "length")
    assert [ask["is_streamed"] for ask in fake.asks()] == [True] * 3
    runner.close()
    (withdrawn,) = [line["ids"] for line in fake.lines()[1:-1] if line["type"] == "withdraw"]
    assert withdrawn == [next(ask["id"] for ask in fake.asks() if ask["prompt_token_ids"][1] == ENDLESS)]


def test_answer_is_cut_where_the_oracle_cuts_it(runner: VllmRunner, tiny_checkpoint: Path) -> None:
    """In `tokens` a bar is the end token; `yz` stops, and four tokens are the most."""
    from moebeam.model_runner.transformers_engine.growing_answers import GrowingAnswer

    tokenizer = runner._tokenizer
    for tokens in ("k", "k|k", "klm|", "klmno", "|klm", "kyzl", "kly|", "klyz", "ky|z"):
        token_ids = [EOS_ID if token == "|" else tokenizer.token_to_id(token) for token in tokens]
        asked = request("x", [70], max_tokens=4, stop=("yz", "never"))
        oracle = GrowingAnswer(asked.sampling, tokenizer, frozenset({EOS_ID}))
        for token_id in token_ids:
            oracle.append(token_id)
        answer = runner._start_answer(asked)
        answer.extend(vllm_process.TokenUpdate("0", token_ids))
        assert (answer.finish_reason, answer.token_ids) == (oracle.finish_reason, oracle.token_ids)
        if answer.finish_reason is not None:
            assert runner._complete(answer, None).text == oracle.text


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        (replace(request("x", []), prompt_token_ids=np.array([], dtype=np.int32)), EngineFailed, "at least one token"),
        (request("x", [261]), EngineFailed, "0 to 260"),
        (request("x", [-1]), EngineFailed, "0 to 260"),
        (request("x", [70], max_tokens=0), EngineFailed, "max_tokens"),
        (request("x", [70] * 58), ContextOverflow, "59 prompt tokens and max_tokens 6 exceed the context of 64"),
        (request("x", [REFUSE]), EngineFailed, "VLLMValidationError: no"),
        (request("x", [ABORT]), EngineFailed, "after 1 tokens, its reason: 'abort'"),
    ],
)
def test_request_that_cannot_run_is_a_typed_failure_and_the_rest_go_on(
    runner: VllmRunner, asked: Request, error: type[Exception], words: str
) -> None:
    found = by_id(runner.generate([request("a", [70]), asked, request("b", [80])]))
    assert type(found["x"].error) is error
    assert words in str(found["x"].error)
    assert found["x"].finish_reason == "error"
    assert found["a"].error is found["b"].error is None


@pytest.mark.parametrize("cause", [DIE_ONCE, GARBAGE])
def test_death_of_vllm_costs_no_answer_when_it_does_not_repeat(runner: VllmRunner, fake: Fake, cause: int) -> None:
    """Garbage is answered by no process, so its request fails; a death that does not come again costs nothing."""
    requests = [request(str(i), [70 + i]) for i in range(12)] + [request("x", [cause])]
    found = by_id(runner.generate(requests))
    assert {name for name, completion in found.items() if completion.error} == ({"x"} if cause == GARBAGE else set())
    assert fake.num_processes == (3 if cause == GARBAGE else 2)


@pytest.mark.parametrize(("batch_size", "num_deaths"), [(4, 2), (32, 3)])
def test_only_the_request_that_vllm_dies_over_fails(
    fake: Fake, tiny_checkpoint: Path, batch_size: int, num_deaths: int
) -> None:
    runner = load_vllm_runner(config_of(tiny_checkpoint, batch_size=batch_size))
    found = by_id(runner.generate([request("x", [69, DIE]), *(request(str(i), [70 + i]) for i in range(12))]))
    assert len(found) == 13
    assert isinstance(found["x"].error, EngineFailed)
    assert "exit status -9" in str(found["x"].error)
    assert all(found[str(i)].error is None for i in range(12))
    assert fake.num_processes == num_deaths + 1
    # What was in flight is asked again before anything else, in token order and fewer at once.
    assert [ask["prompt_token_ids"][1] for ask in fake.asks(1)][:3] == [69, 70, 71][: batch_size * 2 // 16 or 1]
    assert max(ask["num_unanswered"] for ask in fake.asks(num_deaths - 1)) == 1
    assert by_id(runner.generate([request("y", [70])]))["y"].error is None
    runner.close()


def test_deaths_with_answers_in_between_do_not_add_up(runner: VllmRunner, fake: Fake) -> None:
    fatal = [request(str(token), [token, DIE]) for token in (69, 85, 99)]
    found = by_id(runner.generate([*fatal, *(request(f"good {i}", [70 + i]) for i in range(28))]))
    assert {name for name, completion in found.items() if completion.error} == {"69", "85", "99"}
    assert len(found) == 31
    assert fake.num_processes == 7


def test_vllm_that_only_dies_is_an_error_of_the_engine(runner: VllmRunner, fake: Fake) -> None:
    completions = runner.generate([request(str(i), [DIE]) for i in range(40)])
    with pytest.raises(EngineLoadError, match=r"died 5 times without an answer.*exit status -9"):
        list(completions)
    assert fake.num_processes == 5


def test_process_killed_from_outside_is_replaced(runner: VllmRunner, fake: Fake) -> None:
    completions = runner.generate([request("a", [ENDLESS], max_tokens=40), *(request(str(i), [70]) for i in range(4))])
    next(completions)
    os.kill(runner._supervisor.last.popen.pid, signal.SIGKILL)
    found = by_id(completions)
    assert found["a"].error is None
    assert found["a"].usage.completion_tokens == 40
    assert fake.num_processes == 2


def test_request_to_a_dead_process_is_told_so(runner: VllmRunner) -> None:
    process = runner._supervisor.last
    os.kill(process.popen.pid, signal.SIGKILL)
    process._reader.join()
    replies: Any = SimpleQueue()
    process.ask("0", {}, replies)
    assert isinstance(replies.get(timeout=10), EngineExit)


def test_two_calls_at_once_get_their_own_answers(runner: VllmRunner) -> None:
    calls = [runner.generate([request(f"{name}{i}", [70 + i]) for i in range(6)]) for name in "ab"]
    found = [[completion.request_id for completion in pair] for pair in zip(*calls, strict=True)]
    assert sorted(pair[0] for pair in found) == [f"a{i}" for i in range(6)]
    assert sorted(pair[1] for pair in found) == [f"b{i}" for i in range(6)]


def test_abandoned_call_withdraws_what_is_in_flight(runner: VllmRunner, fake: Fake) -> None:
    completions = runner.generate([request(str(i), [70]) for i in range(5)])
    next(completions)
    del completions
    gc.collect()
    assert by_id(runner.generate([request("next", [71])]))["next"].error is None
    (line,) = [line for line in fake.lines()[1:] if line["type"] == "withdraw"]
    assert len(line["ids"]) == 4


def test_process_ends_with_its_runner(fake: Fake, tiny_checkpoint: Path) -> None:
    runner = load_vllm_runner(config_of(tiny_checkpoint))
    popen = runner._supervisor.last.popen
    del runner
    gc.collect()
    assert popen.returncode == 0
    assert fake.lines()[-1] == "end"


def test_closed_engine_refuses_to_answer(runner: VllmRunner) -> None:
    runner.close()
    with pytest.raises(EngineLoadError, match="closed"):
        list(runner.generate([request("a", [70])]))


def test_engine_arguments_are_the_jobs_and_the_machines(
    fake: Fake, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ARGUMENTS_VARIABLE, '{"tensor_parallel_size": 8}')
    load_vllm_runner(config_of(tiny_checkpoint, dtype="bfloat16", batch_size=7, device="cpu")).close()
    load_vllm_runner(config_of(tiny_checkpoint)).close()
    arguments = fake.lines(0)[0]
    assert (arguments["model"], arguments["dtype"]) == (str(tiny_checkpoint), "bfloat16")
    assert (arguments["max_num_seqs"], arguments["tensor_parallel_size"]) == (7, 8)
    assert arguments["enable_prefix_caching"] is True
    assert arguments["generation_config"] == "vllm"
    # The checkpoint is float32; vLLM's own `auto` would make bfloat16 of it.
    assert fake.lines(1)[0]["dtype"] == "float32"
    assert "max_num_seqs" not in fake.lines(1)[0]


def test_what_cannot_be_loaded_is_an_engine_load_error(
    fake: Fake, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in (
        config_of(tmp_path / "missing"),
        config_of("memory://bucket/model"),
        config_of(tiny_checkpoint, device="cuda:1"),
        config_of(tiny_checkpoint, dtype="float8"),
    ):
        with pytest.raises(EngineLoadError, match=r"expected .* found"):
            load_vllm_runner(config)
    for arguments, words in (
        ("[]", "JSON object"),
        ("{", "JSON object"),
        ('{"model": "x"}', "model cannot be set"),
        ('{"fail": 1}', "RuntimeError: see above; .*ValueError: the cause"),
    ):
        monkeypatch.setenv(ARGUMENTS_VARIABLE, arguments)
        with pytest.raises(EngineLoadError, match=words):
            load_vllm_runner(config_of(tiny_checkpoint))
    monkeypatch.delenv(ARGUMENTS_VARIABLE)
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "no_python"))
    with pytest.raises(EngineLoadError, match=PYTHON_VARIABLE):
        load_vllm_runner(config_of(tiny_checkpoint))


def test_without_vllm_the_error_says_what_to_do(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(vllm_runner, "find_spec", lambda name: None)
    with pytest.raises(EngineLoadError, match=f"install it into an environment of its own and set {PYTHON_VARIABLE}"):
        load_vllm_runner(config_of(tiny_checkpoint))


FAKE_VLLM = {
    "vllm/__init__.py": """
        import sys
        from types import SimpleNamespace as Is

        print("noise on standard output")
        if any(path.rstrip("/").endswith("model_runner") for path in sys.path):
            raise RuntimeError("modules of moebeam are in vLLM's way")

        class EngineArgs:
            def __init__(self, model, speed=0):
                self.model = model

        class LLMEngine:
            model_config = Is(max_model_len=9, get_vocab_size=lambda: 8)
            vllm_config = Is(scheduler_config=Is(max_num_seqs=7))
            engine_core = Is(shutdown=lambda: print("shutdown", file=sys.stderr))

            @classmethod
            def from_engine_args(cls, arguments):
                if arguments.model == "broken":
                    raise ValueError("no such model")
                engine = cls()
                engine.running = {}
                return engine

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
        current_platform = SimpleNamespace(device_type="tin")
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

    def ask(self, ask_id: str, token_ids: Sequence[int], **values: object) -> None:
        line: dict[str, object] = {"cache_salt": None, "sampling": {"logprobs": 0}, "grammar": None}
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
    worker.say(type="load", engine={"model": "m"})
    assert worker.hear() == {"type": "ready", "max_model_len": 9, "vocab_size": 8, "max_num_seqs": 7, "device": "tin"}
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
    worker.say(type="load", engine={"model": "m"})
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
    worker.say(type="load", engine={"model": "m"})
    worker.hear()
    worker.ask("a", [1])
    assert worker.hear() == {"type": "broken", "error": "EngineDeadError: dead"}
    assert worker.end()[0] == 1


@pytest.mark.parametrize("engine", [{"model": "broken"}, {"model": "m", "unknown": 1}])
def test_worker_that_cannot_load_says_why(worker: Worker, engine: dict[str, object]) -> None:
    worker.say(type="load", engine=engine)
    line = worker.hear()
    assert line["type"] == "broken"
    assert line["error"].startswith(("ValueError: no such model", "TypeError: "))
    assert worker.end()[0] == 1


needs_vllm = pytest.mark.skipif(not os.environ.get(PYTHON_VARIABLE), reason=f"{PYTHON_VARIABLE} names no interpreter")


def save_tiny_v3_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """A `deepseek_v3` checkpoint that vLLM for CPU takes: heads 64 wide, the router's words spelled out."""
    tokenizer = save_tiny_tokenizer(folder)
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        DeepseekV3ForCausalLM(config).float().save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(content | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"})  # transformers writes neither
    )
    return folder


@pytest.fixture(scope="module")
def v3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_v3_checkpoint(tmp_path_factory.mktemp("v3"))


@pytest.fixture(scope="module")
def real(v3_checkpoint: Path) -> Iterator[VllmRunner]:
    """vLLM with what its build for CPU needs here; a user's own settings come first."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_MLA_DISABLE": "1"}.items():
            environment.setenv(name, os.environ.get(name, value))
        # Compiling takes a minute; without it vLLM 0.32's own CPU kernels answer wrongly for V3, torch's do not.
        quick = '{"enforce_eager": true, "compilation_config": {"custom_ops": ["none"]}}'
        environment.setenv(ARGUMENTS_VARIABLE, os.environ.get(ARGUMENTS_VARIABLE, quick))
        runner = load_vllm_runner(config_of(v3_checkpoint, dtype="float32", batch_size=8))
        yield runner
        runner.close()


def prompts_that_share(num_requests: int, **values: Any) -> list[Request]:
    rng = np.random.default_rng(0)
    shared = rng.integers(5, 261, 260)
    return [
        request(str(i), [*shared[: i % 3 * 130], *rng.integers(5, 261, 5 + i)], tenant=("", "a")[i % 2], **values)
        for i in range(num_requests)
    ]


@needs_vllm
@pytest.mark.integration
def test_real_vllm_answers_as_transformers_does(real: VllmRunner, v3_checkpoint: Path) -> None:
    oracle = load_transformers_runner(config_of(v3_checkpoint, dtype="float32", device="cpu"))
    requests = prompts_that_share(24, max_tokens=14)
    expected = {c.request_id: (c.text, c.finish_reason, c.usage.completion_tokens) for c in oracle.generate(requests)}
    stop = expected["3"][0][4:6]
    requests += [
        replace(one, request_id=f"stop{one.request_id}", sampling=Sampling(14, stop=(stop,))) for one in requests
    ]
    expected = {c.request_id: (c.text, c.finish_reason, c.usage.completion_tokens) for c in oracle.generate(requests)}
    found = by_id(real.generate(requests))
    assert {
        name: (c.text, c.finish_reason, c.usage.completion_tokens) for name, c in found.items() if c.error is None
    } == expected
    assert any(cut[1] == "stop" for name, cut in expected.items() if name.startswith("stop"))


@needs_vllm
@pytest.mark.integration
def test_real_vllm_caches_prefixes_but_never_across_tenants(real: VllmRunner) -> None:
    shared = np.random.default_rng(1).integers(5, 261, 300).tolist()
    first = [request(str(i), [*shared, 70 + i], max_tokens=2, tenant="a") for i in range(3)]
    cached = sorted(completion.usage.cached_tokens or 0 for completion in real.generate(first))
    assert cached[0] == 0
    assert cached[1] > 200
    (other,) = real.generate([replace(first[0], tenant="b")])
    assert other.usage.cached_tokens == 0
    (nobody,) = real.generate([replace(first[0], tenant="")])
    assert nobody.usage.cached_tokens == 0
    (again,) = real.generate([replace(first[0])])
    assert (again.usage.cached_tokens or 0) > 200


@needs_vllm
@pytest.mark.integration
def test_real_vllm_holds_to_grammars_seeds_and_logprobs(real: VllmRunner) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": 0}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    grammar = json.dumps({"grammars": [{"json_schema": schema}]})
    greedy = [replace(one, grammar=grammar) for one in prompts_that_share(6, max_tokens=40)]
    assert {c.text for c in real.generate(greedy)} <= {'{"a":"x"}', '{"a":"y"}'}
    bad = replace(greedy[0], grammar='{"grammars": [{"lark_grammar": "start: missing"}]}')
    (refused,) = real.generate([bad])
    assert isinstance(refused.error, EngineFailed)
    (drawn,) = prompts_that_share(1, max_tokens=6, temperature=1.0, logprobs=True)
    twins = [replace(drawn, request_id="twin"), drawn, replace(drawn, request_id="other", attempt=2)]
    found = by_id(real.generate(twins))
    assert found["twin"].text == found["0"].text != found["other"].text
    for completion in found.values():
        assert completion.logprobs is not None
        assert len(completion.logprobs) == completion.usage.completion_tokens
        assert max(completion.logprobs) <= 0


@needs_vllm
@pytest.mark.integration
def test_real_vllm_that_is_killed_is_replaced_and_leaves_nothing_behind(real: VllmRunner) -> None:
    requests = prompts_that_share(12, max_tokens=60)
    completions = real.generate(requests)
    first = next(completions)
    killed = real._supervisor.last.popen.pid
    os.kill(killed, signal.SIGKILL)
    found = by_id(completions) | {first.request_id: first}
    assert len(found) == 12
    assert all(completion.error is None for completion in found.values())
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.killpg(killed, 0)
