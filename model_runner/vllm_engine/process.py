"""A process that runs vLLM: how it is started, what is sent to it, and what comes back.

Stands between `runner.py` and `worker.py`, which lists the lines of JSON that both sides exchange. It is supervised as
every engine's process (`engine_process/`); only the worker's side stands alone, as its interpreter has none of our
packages.
"""

import contextlib
import json
import logging
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from moebeam.model_runner.engine_process.process_link import LOADING, EngineExit, ProcessLink, start_process
from moebeam.model_runner.host_folder import host_folder, make_private_folder
from moebeam.model_runner.python_process import foreign_environment
from moebeam.model_runner.vllm_engine.engine_arguments import EngineArguments
from moebeam.model_runner.vllm_engine.prefix_units import PrefixUnit
from moebeam.schemas.determinism import Determinism
from moebeam.schemas.errors import EngineLoadError

PYTHON_VARIABLE = "MOEBEAM_VLLM_PYTHON"
WORKER_SCRIPT = Path(__file__).with_name("worker.py")
SHUTDOWN_TIMEOUT_S = 30.0

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedLimits:
    """What a loaded vLLM takes: tokens of a context, token ids, sequences that run together; where and how it computes.

    Attributes:
        is_quantized: whether weights or the cache have fewer bits than `dtype`.
        hit_unit, num_dropped_units, num_replayed_tokens: as of `PrefixUnit`.
    """

    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    device: str
    dtype: str
    is_quantized: bool
    is_batch_invariant: bool
    version: str
    block_size: int
    hit_unit: int
    num_dropped_units: int
    num_replayed_tokens: int

    @property
    def prefix_unit(self) -> PrefixUnit:
        return PrefixUnit(self.hit_unit, self.num_dropped_units, self.num_replayed_tokens, self.block_size)


@dataclass(frozen=True, slots=True)
class TokenUpdate:
    """The next tokens of one request, or in `error` why vLLM refuses it.

    `top_logprobs` has the ids and log probabilities of the likeliest tokens at each place, likeliest first.
    """

    ask_id: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] | None = None
    top_logprobs: Sequence[Sequence[tuple[int, float]]] | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


Replies: TypeAlias = "SimpleQueue[TokenUpdate | EngineExit | None]"
"""None wakes a call whose requests were given back."""


class _NotBatchInvariant(EngineLoadError):
    """vLLM did not load with kernels whose rounding does not depend on the batch; it may without."""


def start_vllm(python: str, arguments: EngineArguments) -> "VllmProcess":
    """Start vLLM; with `batch_invariant` `auto` a second time, without, if it does not load with it.

    Many attention layers, those of DeepSeek V4 among them, have no such kernels in vLLM 0.32, which says so late.

    Raises:
        EngineLoadError: as of `VllmProcess`.
    """
    try:
        return VllmProcess(python, arguments)
    except _NotBatchInvariant as error:
        if arguments.batch_invariant != "auto":
            raise
        _LOGGER.warning("vLLM is loaded again without VLLM_BATCH_INVARIANT=1: %s", error)
        return VllmProcess(python, replace(arguments, batch_invariant="off"))


class VllmProcess(ProcessLink):
    """One vLLM with a model loaded.

    Args:
        python: the interpreter that has vLLM.
    Raises:
        EngineLoadError: the interpreter cannot be run, or vLLM ended while it loaded.
    """

    def __init__(self, python: str, arguments: EngineArguments) -> None:
        try:
            sockets = make_private_folder(host_folder() / "vllm")
        except OSError as error:
            raise EngineLoadError(f"no folder for the sockets of vLLM's processes: {error}") from error
        environment = {
            # Its processes speak with each other, partly in pickles; nobody else shall reach them.
            "VLLM_RPC_BASE_PATH": str(sockets),
            "VLLM_HOST_IP": "127.0.0.1",
            # Nothing is fetched and nothing is reported to anyone; threads and `fork` do not go together.
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
            **foreign_environment(),
        }
        try:
            popen = start_process(
                [python, str(WORKER_SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        except OSError as error:
            raise EngineLoadError(f"{PYTHON_VARIABLE}: expected a Python interpreter, found: {error}") from error
        self._lines = _JsonLines(popen)
        self.was_batch_invariant = False
        super().__init__(self._lines, popen, SHUTDOWN_TIMEOUT_S)
        load = {
            "type": "load",
            "engine": dict(arguments.values),
            "named": dict(arguments.named),
            "batch_invariant": arguments.batch_invariant,
            "adapters": dict(arguments.adapters or {}),
        }
        try:
            self.limits: LoadedLimits = self._load(load)
        except EOFError as error:
            kind = _NotBatchInvariant if self.was_batch_invariant else EngineLoadError
            raise kind(f"vLLM could not load the model: {error}") from None

    def ask(self, ask_id: str, message: Mapping[str, object], replies: Replies) -> None:
        """Send a request; its updates, or the process's exit, come to `replies`."""
        if self._register(ask_id, replies):
            self._send({"type": "ask", "id": ask_id, **message})

    def withdraw(self, ask_ids: Iterable[str]) -> None:
        """Drop requests that nobody waits for any more."""
        if known := self._forget(ask_ids):
            self._send({"type": "withdraw", "ids": known})

    def _route(self, message: dict[str, Any]) -> None:
        kind = message.pop("type")
        if kind == "ready":
            self._deliver(LOADING, LoadedLimits(**message), is_last=True)
        elif kind == "broken":
            self._failure = str(message["error"])
            self.was_batch_invariant = bool(message.get("was_batch_invariant"))
        elif kind in ("tokens", "refused"):
            update = TokenUpdate(message.pop("id"), **message)
            self._deliver(update.ask_id, update, is_last=update.is_last)
        else:
            raise ValueError(f"unknown type {kind!r}")

    def _hang_up(self) -> None:
        self._lines.close_input()


def promise(limits: LoadedLimits) -> Determinism:
    """What a loaded vLLM promises of greedy answers."""
    where = f"vLLM {limits.version} on {limits.device}, {limits.dtype}"
    if limits.is_batch_invariant:
        return Determinism("bitwise", f"{where}, with VLLM_BATCH_INVARIANT=1", is_seeded=True)
    if limits.dtype == "float32" and not limits.is_quantized:
        return Determinism("tokens", f"{where}, without batch-invariant kernels", is_seeded=True)
    rounded = ", weights or cache quantised" if limits.is_quantized else ""
    return Determinism("none", f"{where}{rounded}, without batch-invariant kernels", is_seeded=False)


class _JsonLines:
    """A process's standard input and output as a stream of messages, a line of JSON each."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        assert popen.stdin is not None and popen.stdout is not None
        self._stdin, self._stdout = popen.stdin, popen.stdout

    def send(self, obj: Any, /) -> None:
        self._stdin.write(json.dumps(obj).encode() + b"\n")
        self._stdin.flush()

    def recv(self) -> Any:
        line = self._stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def close_input(self) -> None:
        with contextlib.suppress(OSError):
            self._stdin.close()

    def close(self) -> None:
        self.close_input()
        self._stdout.close()
