"""The `vllm` engine: vLLM in an interpreter and a process of its own, fed in the order that its prefix cache likes.

Stands inside the *answer* stage. `model_runner/vllm_engine/worker.py` is the other side of the pipe and draws its
lines. What vLLM itself needs to know of the machine (memory for its cache, threads, devices) is set through vLLM's
environment variables or `MOEBEAM_VLLM_ARGS`, a JSON object of further arguments of `vllm.EngineArgs`, for example
`{"tensor_parallel_size": 8}`.

Unlike our own engines vLLM caches whole blocks of tokens (`usage.cached_tokens` counts these), and does not promise
that rounding is independent of the batch: in bfloat16 a neighbour can change a greedy token. A temperature between 0
and 0.01 is 0.01 there.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from queue import SimpleQueue
from signal import SIGKILL, SIGTERM
from typing import IO, Any, TypeAlias, cast

import tokenizers

from moebeam.model_runner.checkpoint.files import read_json_object, read_tokenizer
from moebeam.model_runner.checkpoint.prompt_limits import why_not_runnable
from moebeam.model_runner.encoding.answer_text import AnswerReader, StopStrings, read_end_token_ids, seed_of
from moebeam.model_runner.encoding.chat_encoding import encoding_of
from moebeam.model_runner.engine_process.process_log import ProcessLog
from moebeam.model_runner.prefix_tree import prefix_key
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import EngineFailed, EngineLoadError, RowError
from moebeam.schemas.records import Completion, FinishReason, Request, Usage
from moebeam.schemas.store import storage

PROVIDER = "local"
PYTHON_VARIABLE = "MOEBEAM_VLLM_PYTHON"
ARGUMENTS_VARIABLE = "MOEBEAM_VLLM_ARGS"
WORKER_SCRIPT = Path(__file__).with_name("vllm_worker.py")

NUM_WINDOW_REQUESTS = 512
"""Most requests that are pulled ahead of the answers, or twice what vLLM has in flight where that is more."""

MAX_DEATHS = 5
"""After so many deaths of vLLM without one answer in between the engine counts as broken."""

SUSPECT_SHARE = 16
"""What was in flight at a death is asked again in groups of so small a part of the usual, then one by one."""

SHUTDOWN_TIMEOUT_S = 30.0
_DTYPES = frozenset({"auto", "float32", "bfloat16"})
_NUM_LOG_LINES = 200
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedLimits:
    """What a loaded vLLM takes: tokens of a context, token ids, sequences that run together; and on which device."""

    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    device: str


@dataclass(frozen=True, slots=True)
class _News:
    """Of one request: its next tokens, or in `error` why vLLM refuses it."""

    ask_id: str
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True, eq=False)
class _Death:
    """The end of a process, and what is known of its cause."""

    process: "_Process"
    cause: str


_Replies: TypeAlias = "SimpleQueue[_News | _Death]"


class _Process:
    """One vLLM with a model loaded. Safe for several threads."""

    def __init__(self, python: str, engine_arguments: Mapping[str, Json]) -> None:
        """Start vLLM and wait until it is ready.

        Raises:
            EngineLoadError: the interpreter cannot be run, or vLLM ended instead.
        """
        self._lock = threading.Lock()  # over the routes and the death
        self._write_lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._routes: dict[str, _Replies] = {}
        self._death: _Death | None = None
        self._failure = ""
        self._ready: SimpleQueue[LoadedLimits | _Death] = SimpleQueue()
        environment = {
            # Nothing is fetched and nothing is reported to anyone; threads and `fork` do not go together.
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
            **os.environ,
        }
        try:
            self._popen = subprocess.Popen(
                [python, str(WORKER_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                # A group of its own: Ctrl-C is ours to handle, and vLLM's own processes can be killed with it.
                start_new_session=True,
            )
        except OSError as error:
            raise EngineLoadError(f"{PYTHON_VARIABLE}: expected a Python interpreter, found: {error}") from error
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        assert self._popen.stderr is not None
        self._stdin = self._popen.stdin
        self._log = ProcessLog(self._popen.stderr, _LOGGER, max_lines=_NUM_LOG_LINES)
        self._reader = threading.Thread(target=self._read, args=(self._popen.stdout,), daemon=True)
        self._reader.start()
        self._send({"type": "load", "engine": dict(engine_arguments)})
        try:
            ready = self._ready.get()
        except BaseException:
            self.close()
            raise
        if isinstance(ready, _Death):
            raise EngineLoadError(f"vLLM could not load the model: {ready.cause}")
        self.limits = ready

    @property
    def is_alive(self) -> bool:
        with self._lock:
            return self._death is None

    def ask(self, ask_id: str, message: dict[str, object], replies: _Replies) -> None:
        """Send a request; its news, or the process's death, come to `replies`."""
        with self._lock:
            if self._death is not None:
                replies.put(self._death)
                return
            self._routes[ask_id] = replies
        self._send({"type": "ask", "id": ask_id, **message})

    def withdraw(self, ask_ids: Iterable[str]) -> None:
        """Drop requests that nobody waits for any more."""
        with self._lock:
            known = [ask_id for ask_id in ask_ids if self._routes.pop(ask_id, None) is not None]
        if known:
            self._send({"type": "withdraw", "ids": known})

    def close(self) -> None:
        """End vLLM: by the end of its input, then by force."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the owner ends, not the owner
        self._close_input()
        self._reader.join(SHUTDOWN_TIMEOUT_S)
        self._signal_group(SIGKILL)

    def _send(self, message: dict[str, object]) -> None:
        line = json.dumps(message).encode() + b"\n"
        # Where the process is dead or closed, `_read` tells everyone who waits.
        with self._write_lock, contextlib.suppress(OSError, ValueError):
            self._stdin.write(line)
            self._stdin.flush()

    def _read(self, stdout: IO[bytes]) -> None:
        """Hand each line to whom it concerns, until the process ends; then say so to all who still wait."""
        try:
            with stdout:
                for line in stdout:
                    self._take(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            self._failure = f"expected a line of the worker's protocol, found: {type(error).__name__}: {error}"
            self._signal_group(SIGKILL)
        # Looked at before `wait`: until then the group's number cannot become another's.
        ended = os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOWAIT)
        if ended is None or ended.si_status != 0:
            # vLLM's other processes give memory back; their log ends when the last of them has.
            self._signal_group(SIGTERM)
            self._log.wait(SHUTDOWN_TIMEOUT_S)
            self._signal_group(SIGKILL)
        code = self._popen.wait()
        self._close_input()
        self._log.wait(timeout_s=1.0)
        causes = [self._failure or f"its process ended with exit status {code}", *_error_lines(self._log)]
        death = _Death(self, "; ".join(causes))
        with self._lock:
            self._death = death
            waiting = set(self._routes.values())
            self._routes.clear()
        self._ready.put(death)
        for replies in waiting:
            replies.put(death)

    def _take(self, message: dict[str, Any]) -> None:
        kind = message.pop("type")
        if kind == "ready":
            self._ready.put(LoadedLimits(**message))
        elif kind == "broken":
            self._failure = str(message["error"])
        elif kind in ("tokens", "refused"):
            news = _News(message.pop("id"), **message)
            with self._lock:
                replies = self._routes.pop(news.ask_id, None) if news.is_last else self._routes.get(news.ask_id)
            if replies is not None:
                replies.put(news)
        else:
            raise ValueError(f"unknown type {kind!r}")

    def _close_input(self) -> None:
        with self._write_lock, contextlib.suppress(OSError):
            self._stdin.close()

    def _signal_group(self, number: int) -> None:
        if self._popen.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, number)


class VllmRunner:
    """A loaded vLLM. Its process ends with the runner, or with this process."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        python: str,
        engine_arguments: Mapping[str, Json],
        tokenizer: tokenizers.Tokenizer,
        end_token_ids: Sequence[int],
    ) -> None:
        """
        Args:
            config: what the job says of the engine.
            python: an interpreter that has vLLM.
            engine_arguments: of `vllm.EngineArgs`.
            tokenizer: makes text of tokens.
            end_token_ids: the tokens that end an answer.
        Raises:
            EngineLoadError: vLLM cannot be started or cannot load the model.
        """
        self.config = config
        self._tokenizer = tokenizer
        self._end_token_ids = frozenset(end_token_ids)
        self._reader = AnswerReader(tokenizer, encoding_of(config.path, config.encoding))
        self._ask_ids = count()
        self._start = lambda: _Process(python, engine_arguments)
        self._start_lock = threading.Lock()
        self._processes: list[_Process] = []
        self._finalizer = weakref.finalize(self, _close_all, self._processes)
        self.limits = self._process().limits
        self.max_in_flight = 2 * self.limits.max_num_seqs
        self.num_window_requests = max(NUM_WINDOW_REQUESTS, 2 * self.max_in_flight)

    def close(self) -> None:
        """End vLLM now; nothing can be answered afterwards."""
        self._finalizer()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests, pulling a window of them ahead of the answers and sending it in token order.

        vLLM gets twice as many as it runs together, so that it never waits for the next. When it dies, another is
        started and what was in flight is asked again, fewer at once after each death, so that only what it dies over
        fails.

        Raises:
            EngineLoadError: vLLM died `MAX_DEATHS` times without an answer in between, or could not be started again.
        """
        call = _Call(iter(requests), self._process())
        try:
            while call.waiting or call.in_flight or not call.is_exhausted:
                yield from self._pull(call)
                self._send(call)
                yield from self._receive(call)
        finally:
            call.process.withdraw(call.in_flight)

    def _process(self) -> _Process:
        """The living process; another is started if the last one died.

        Raises:
            EngineLoadError: none can be started, or the engine was closed.
        """
        with self._start_lock:
            if not self._finalizer.alive:
                raise EngineLoadError("vLLM was closed; load the engine again")
            if not self._processes or not self._processes[-1].is_alive:
                self._processes[:] = [self._start()]
            return self._processes[-1]

    def _pull(self, call: "_Call") -> Iterator[Completion]:
        """Where nothing waits, take another window of requests and bring it into token order; refusals come out."""
        if call.waiting or call.is_exhausted:
            return
        pulled = list(islice(call.source, self.num_window_requests - len(call.in_flight)))
        call.is_exhausted = not pulled
        runnable: list[Request] = []
        for request in pulled:
            if (error := self._refusal(request)) is None:
                runnable.append(request)
            else:
                yield self._completion(self._answer_to(request), error)
        call.waiting.extend(
            (request, 0) for request in sorted(runnable, key=lambda one: prefix_key(one.tenant, one.prompt_token_ids))
        )

    def _send(self, call: "_Call") -> None:
        """Give vLLM as many requests as it may have."""
        while call.waiting and len(call.in_flight) < self._most_in_flight(call):
            request, num_deaths = call.waiting.popleft()
            ask_id = str(next(self._ask_ids))
            call.in_flight[ask_id] = self._answer_to(request, num_deaths)
            call.process.ask(ask_id, _ask_message(request, self._end_token_ids), call.replies)

    def _most_in_flight(self, call: "_Call") -> int:
        num_deaths = max([call.waiting[0][1], *(answer.num_deaths for answer in call.in_flight.values())])
        return (self.max_in_flight, max(1, self.max_in_flight // SUSPECT_SHARE), 1)[min(num_deaths, 2)]

    def _receive(self, call: "_Call") -> Iterator[Completion]:
        """Wait for the next news, unless nothing is in flight."""
        if not call.in_flight:
            return
        news = call.replies.get()
        if isinstance(news, _Death):
            if news.process is call.process:  # else its death was seen to already
                yield from self._recover(call, news.cause)
        elif (answer := call.in_flight.get(news.ask_id)) is not None:
            error = answer.extend(news)
            if error is not None or answer.finish_reason is not None:
                call.num_deaths = 0
                del call.in_flight[news.ask_id]
                if not news.is_last:
                    call.process.withdraw([news.ask_id])
                yield self._completion(answer, error)

    def _recover(self, call: "_Call", cause: str) -> Iterator[Completion]:
        """Start another process; what was in flight waits again, but what was alone at its second death fails."""
        call.num_deaths += 1
        if call.num_deaths >= MAX_DEATHS:
            raise EngineLoadError(f"vLLM died {call.num_deaths} times without an answer: {cause}")
        lost = list(call.in_flight.values())
        call.in_flight.clear()
        if len(lost) == 1 and lost[0].num_deaths > 0:
            yield self._completion(lost.pop(), EngineFailed(f"vLLM dies over this request: {cause}"))
        call.waiting.extendleft((answer.request, answer.num_deaths + 1) for answer in reversed(lost))
        call.process = self._process()

    def _answer_to(self, request: Request, num_deaths: int = 0) -> "_Answer":
        stop = request.sampling.stop
        is_stopped = StopStrings(stop, self._tokenizer) if stop else None
        return _Answer(request, self._end_token_ids, is_stopped, num_deaths)

    def _refusal(self, request: Request) -> RowError | None:
        """Why a request cannot run at all; vLLM would cut `max_tokens` in silence instead."""
        return why_not_runnable(
            request.prompt_token_ids,
            request.sampling.max_tokens,
            vocab_size=self.limits.vocab_size,
            context_length=self.limits.max_model_len,
        )

    def _completion(self, answer: "_Answer", error: RowError | None) -> Completion:
        request = answer.request
        finish_reason = "error" if error is not None else answer.finish_reason or "length"
        said = self._reader.read(request, answer.token_ids, finish_reason)
        return Completion(
            request_id=request.request_id,
            text=said.text,
            finish_reason=said.finish_reason,
            usage=Usage(
                request.num_prompt_tokens,
                len(answer.token_ids),
                # Nothing was computed for a request that vLLM never ran.
                cached_tokens=answer.cached_tokens if answer.token_ids else 0,
                reasoning_tokens=said.num_reasoning_tokens,
            ),
            started_at=answer.started_at,
            latency_ms=(time.perf_counter() - answer.start) * 1000,
            provider=PROVIDER,
            model=self.config.name,
            model_revision=self.config.revision,
            logprobs=tuple(answer.logprobs) if request.sampling.logprobs and error is None else None,
            reasoning_content=said.reasoning_content,
            tool_calls=said.tool_calls,
            error=error or said.error,
        )


@dataclass(slots=True)
class _Answer:
    """An answer as it grows; `token_ids` end with the end token or the stop string, where there is one."""

    request: Request
    end_token_ids: frozenset[int]
    is_stopped: StopStrings | None
    num_deaths: int = 0
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    start: float = field(default_factory=time.perf_counter)
    cached_tokens: int | None = None
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    finish_reason: FinishReason | None = None

    def extend(self, news: _News) -> EngineFailed | None:
        """Take more tokens, up to the answer's end; a failure if vLLM ended before the answer did."""
        if news.error is not None:
            return EngineFailed(f"vLLM refused the request: {news.error}")
        if news.cached_tokens is not None:
            self.cached_tokens = news.cached_tokens
        for position, token_id in enumerate(news.token_ids):
            if self.finish_reason is None:
                self._append(token_id)
                if news.logprobs is not None:
                    self.logprobs.append(news.logprobs[position])
        if self.finish_reason is None and news.finish_reason is not None:
            if news.finish_reason not in ("stop", "length"):
                return EngineFailed(
                    f"vLLM ended the answer after {len(self.token_ids)} tokens, its reason: {news.finish_reason!r}"
                )
            self.finish_reason = news.finish_reason
        return None

    def _append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if token_id in self.end_token_ids or (self.is_stopped is not None and self.is_stopped(self.token_ids)):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.request.sampling.max_tokens:
            self.finish_reason = "length"


@dataclass(slots=True)
class _Call:
    """What one `generate` has pulled and not answered; those who wait come with the deaths they were in flight at."""

    source: Iterator[Request]
    process: _Process
    replies: _Replies = field(default_factory=lambda: SimpleQueue[_News | _Death]())
    waiting: deque[tuple[Request, int]] = field(default_factory=lambda: deque[tuple[Request, int]]())
    in_flight: dict[str, _Answer] = field(default_factory=dict[str, _Answer])
    is_exhausted: bool = False
    num_deaths: int = 0


def load_vllm_runner(config: EngineConfig) -> VllmRunner:
    """Load a checkpoint folder into a vLLM of its own; nothing is ever fetched, and no code of the checkpoint is run.

    Args:
        config: `device` is vLLM's own, whatever it was built for; another one is refused. `dtype` `auto` is the
            checkpoint's. `batch_size` is vLLM's `max_num_seqs`.
    Raises:
        EngineLoadError: no interpreter has vLLM, or the folder, the device or an argument cannot be used.
    """
    if not storage.is_local(config.path) or not storage.is_folder(config.path):
        raise EngineLoadError(f"{config.path}: expected a local folder with a checkpoint, found none")
    if config.dtype not in _DTYPES:
        raise EngineLoadError(f"expected dtype {', '.join(sorted(_DTYPES))}, found {config.dtype!r}")
    runner = VllmRunner(
        config,
        python=_python(),
        engine_arguments=_engine_arguments(config),
        tokenizer=read_tokenizer(config.path),
        end_token_ids=read_end_token_ids(config.path),
    )
    if config.device != "auto" and config.device.partition(":")[0] != runner.limits.device:
        runner.close()
        raise EngineLoadError(f"expected a vLLM for device {config.device!r}, found one for {runner.limits.device!r}")
    return runner


def _close_all(processes: Iterable[_Process]) -> None:
    for process in processes:
        process.close()


def _ask_message(request: Request, end_token_ids: Iterable[int]) -> dict[str, object]:
    """A request as the worker takes it."""
    sampling = request.sampling
    return {
        "prompt_token_ids": request.prompt_token_ids.tolist(),
        # A digest, so that names stay out of vLLM's logs.
        "cache_salt": hashlib.sha256(request.tenant.encode("utf-8", "surrogatepass")).hexdigest()
        if request.tenant
        else None,
        "sampling": {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": None if sampling.is_greedy else seed_of(request),
            "logprobs": 0 if sampling.logprobs else None,  # none beside the drawn token's own
            "stop_token_ids": sorted(end_token_ids),
        },
        "grammar": request.grammar,
        # Stop strings are looked for here, token by token.
        "is_streamed": bool(sampling.stop),
    }


def _python() -> str:
    """The interpreter that has vLLM."""
    if python := os.environ.get(PYTHON_VARIABLE):
        return python
    if find_spec("vllm") is not None:
        return sys.executable
    raise EngineLoadError(
        f"engine 'vllm' needs vLLM: install it into an environment of its own and set {PYTHON_VARIABLE} to that "
        "environment's python, or install it beside moebeam"
    )


def _engine_arguments(config: EngineConfig) -> dict[str, Json]:
    """What `vllm.EngineArgs` is given: the job's words, ours, and the machine's from `MOEBEAM_VLLM_ARGS`."""
    dtype = config.dtype
    if dtype == "auto":
        found = read_json_object(config.path, "config.json")
        # vLLM's own `auto` makes bfloat16 of a float32 checkpoint.
        dtype = "float32" if found.get("dtype", found.get("torch_dtype")) == "float32" else "auto"
    arguments: dict[str, Json] = {
        "model": config.path,
        "dtype": dtype,
        "enable_prefix_caching": True,
        # A checkpoint's own temperature or penalties must not leak in.
        "generation_config": "vllm",
        "structured_outputs_config": {"backend": "guidance"},
        "trust_remote_code": False,
        "disable_log_stats": True,
    }
    if config.batch_size:
        arguments["max_num_seqs"] = config.batch_size
    try:
        more: object = json.loads(os.environ.get(ARGUMENTS_VARIABLE) or "{}")
    except ValueError as error:
        raise EngineLoadError(f"{ARGUMENTS_VARIABLE}: expected a JSON object, found: {error}") from error
    if not isinstance(more, dict):
        raise EngineLoadError(f"{ARGUMENTS_VARIABLE}: expected a JSON object, found {type(more).__name__}")
    if taken := more.keys() & arguments.keys():
        raise EngineLoadError(f"{ARGUMENTS_VARIABLE}: {', '.join(sorted(taken))} cannot be set here")
    return arguments | cast("dict[str, Json]", more)


def _error_lines(log: Iterable[str]) -> list[str]:
    """The last lines of a log that name an error, each once."""
    found = [line for line in log if re.search(r"\b\w+(Error|Exception)\b: ", line)]
    return list(dict.fromkeys(found))[-3:]
