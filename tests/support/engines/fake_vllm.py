"""A worker process that answers as vLLM's would, without vLLM, and what tests ask of it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.records import Completion, Request
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.tiny_requests import request_of

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
    say(type="ready", max_model_len=64, vocab_size=261, max_num_seqs=engine.get("max_num_seqs", 4), device="cpu",
        dtype="float32", is_quantized=False, is_batch_invariant=False, version="0", block_size=16, hit_unit=16,
        num_dropped_units=0, num_replayed_tokens=0)
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
