"""A process that runs vLLM: how it is started, what is sent to it, and what comes back.

Stands between `runner.py` and `worker.py`, which lists the lines of JSON that both sides exchange. It is supervised as
every engine's process (`engine_process/`); only the worker's side stands alone, as its interpreter has none of our
packages.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

from moebeam.model_runner.engine_process.process_link import LOADING, EngineExit, ProcessLink, start_process
from moebeam.model_runner.host_folder import host_folder, make_private_folder
from moebeam.model_runner.python_process import foreign_environment
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import EngineLoadError

PYTHON_VARIABLE = "MOEBEAM_VLLM_PYTHON"
WORKER_SCRIPT = Path(__file__).with_name("worker.py")
SHUTDOWN_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class LoadedLimits:
    """What a loaded vLLM takes: tokens of a context, token ids, sequences that run together; and on which device."""

    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    device: str


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


class VllmProcess(ProcessLink):
    """One vLLM with a model loaded.

    Args:
        python: the interpreter that has vLLM.
        engine_arguments: of `vllm.EngineArgs`.
    Raises:
        EngineLoadError: the interpreter cannot be run, or vLLM ended while it loaded.
    """

    def __init__(self, python: str, engine_arguments: Mapping[str, Json]) -> None:
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
        super().__init__(self._lines, popen, SHUTDOWN_TIMEOUT_S)
        try:
            self.limits: LoadedLimits = self._load({"type": "load", "engine": dict(engine_arguments)})
        except EOFError as error:
            raise EngineLoadError(f"vLLM could not load the model: {error}") from None

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
        elif kind in ("tokens", "refused"):
            update = TokenUpdate(message.pop("id"), **message)
            self._deliver(update.ask_id, update, is_last=update.is_last)
        else:
            raise ValueError(f"unknown type {kind!r}")

    def _hang_up(self) -> None:
        self._lines.close_input()


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
