"""The `vllm` engine: vLLM in an interpreter and a process of its own, fed in the order that its prefix cache likes.

Stands inside the *answer* stage; `process.py` starts vLLM and `worker.py` runs it. What vLLM needs to know of the
machine (memory for its cache, threads, devices) is set through vLLM's environment variables or `MOEBEAM_VLLM_ARGS`, a
JSON object of further arguments of `vllm.EngineArgs`, for example `{"gpu_memory_utilization": 0.95}`; the job's own are
in `[model.engine_args]`.

Unlike our own engines vLLM caches whole units of tokens (`prefix_units.py`; `usage.cached_tokens` counts what it hit),
and promises that rounding is independent of the batch only with `VLLM_BATCH_INVARIANT=1`: without, a neighbour can
change a greedy token in bfloat16. A temperature between 0 and 0.01 is 0.01 there.
"""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import count, islice
from queue import SimpleQueue
from threading import Event

import tokenizers

from moebeam.model_runner.checkpoint.files import read_tokenizer
from moebeam.model_runner.checkpoint.model_config import read_model_config
from moebeam.model_runner.checkpoint.prompt_limits import why_not_runnable
from moebeam.model_runner.encoding.answer_text import AnswerReader, StopStrings
from moebeam.model_runner.encoding.chat_encoding import ChatEncoding, load_encoding
from moebeam.model_runner.encoding.end_tokens import read_end_token_ids
from moebeam.model_runner.engine_process.process_link import EngineExit
from moebeam.model_runner.engine_process.supervisor import Supervisor
from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.vllm_engine.ask import build_ask
from moebeam.model_runner.vllm_engine.engine_arguments import EngineArguments, build_engine_arguments
from moebeam.model_runner.vllm_engine.options import VllmOptions
from moebeam.model_runner.vllm_engine.prefix_account import PrefixAccount, Ranks
from moebeam.model_runner.vllm_engine.prefix_units import unit_key
from moebeam.model_runner.vllm_engine.process import (
    PYTHON_VARIABLE,
    Replies,
    TokenUpdate,
    VllmProcess,
    promise,
    start_vllm,
)
from moebeam.schemas.determinism import Determinism
from moebeam.schemas.errors import EngineFailed, EngineLoadError, RowError
from moebeam.schemas.records import Completion, FinishReason, Request, TokenLogprob, Usage
from moebeam.schemas.store import storage

PROVIDER = "local"

NUM_WINDOW_REQUESTS = 512
"""Most requests that are pulled ahead of the answers, or twice what vLLM has in flight where that is more."""

MAX_FRUITLESS_RESTARTS = 5
"""Exits of vLLM in a row without an answer, after which the engine counts as broken."""

SUSPECT_SHARE = 16
"""What was in flight at an exit is asked again with this fraction of the usual number in flight, then one by one."""

_DTYPES = frozenset({"auto", "float32", "bfloat16"})

_LOGGER = logging.getLogger(__name__)


class VllmRunner:
    """A loaded vLLM. Its process ends with the runner, or with this process."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        python: str,
        engine_arguments: EngineArguments,
        tokenizer: tokenizers.Tokenizer,
        encoding: ChatEncoding,
        end_token_ids: Sequence[int],
    ) -> None:
        """
        Args:
            config: what the job says of the engine.
            python: an interpreter that has vLLM.
            engine_arguments: what vLLM is started with.
            tokenizer: makes text of tokens.
            encoding: reads answers out of that text.
            end_token_ids: the tokens that end an answer.
        Raises:
            EngineLoadError: vLLM cannot be started or cannot load the model.
        """
        self.config = config
        self._tokenizer = tokenizer
        self._end_token_ids = frozenset(end_token_ids)
        self._reader = AnswerReader(tokenizer, encoding, self._end_token_ids)
        self._ask_ids = count()
        self._is_given_back = Event()
        self._calls: list[_Call] = []
        self._supervisor: Supervisor[VllmProcess] = Supervisor(lambda _: start_vllm(python, engine_arguments))
        self.limits = self._supervisor.last.limits
        options = config.options_as(VllmOptions)
        self._adapter = options.adapter
        self._adapters = frozenset(options.adapters)
        self._ranks = Ranks(options.data_parallel_size, 2 * self.limits.max_num_seqs)
        self.prefixes = PrefixAccount(self.limits.prefix_unit)
        self.max_in_flight = 2 * self.limits.max_num_seqs * options.data_parallel_size
        self.num_window_requests = max(NUM_WINDOW_REQUESTS, 2 * self.max_in_flight)

    def close(self) -> None:
        """End vLLM now; nothing can be answered afterwards."""
        self._supervisor.close()

    def counters(self) -> Mapping[str, float]:
        """See `CountingRunner`: what prompts shared, what of it vLLM's cache could reach, and what it hit."""
        return self.prefixes.counters()

    def determinism(self) -> Determinism:
        """See `PromisingRunner`; as vLLM was loaded last."""
        return promise(self._supervisor.last.limits)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests, pulling a window of them ahead of the answers and sending it in token order.

        vLLM gets twice as many as it runs together, so that it never waits for the next. When it dies, another is
        started and what was in flight is asked again, fewer at once after each exit, so that only the request that
        kills it fails.

        Raises:
            EngineLoadError: vLLM died `MAX_FRUITLESS_RESTARTS` times without an answer in between, or could not be
                started again.
        """
        if self._is_given_back.is_set():
            return
        call = _Call(iter(requests), self._supervisor.running())
        self._calls.append(call)
        try:
            while not self._is_given_back.is_set() and (call.waiting or call.in_flight or not call.is_exhausted):
                yield from self._pull(call)
                self._send(call)
                yield from self._receive(call)
        finally:
            self._calls.remove(call)
            self._ranks.give_back(answer.rank for answer in call.in_flight.values())
            call.process.withdraw(call.in_flight)

    def give_back(self) -> None:
        """See `StoppableRunner`; vLLM drops what it has."""
        self._is_given_back.set()
        for call in list(self._calls):
            call.replies.put(None)

    def _pull(self, call: "_Call") -> Iterator[Completion]:
        """Where nothing waits, pull another window in token order; yields the failures of requests that cannot run."""
        if call.waiting or call.is_exhausted:
            return
        pulled = list(islice(call.source, self.num_window_requests - len(call.in_flight)))
        call.is_exhausted = not pulled
        runnable: list[Request] = []
        for request in pulled:
            if (error := self._check_request(request)) is None:
                runnable.append(request)
            else:
                yield self._complete(self._start_answer(request), error)
        ordered = self.prefixes.arrange(runnable, self._find_adapter)
        call.waiting.extend((request, 0) for request in ordered)

    def _find_adapter(self, request: Request) -> str | None:
        """The LoRA adapter that answers a request; None for the checkpoint itself."""
        asked = request.options.model
        return asked if asked in self._adapters else self._adapter

    def _send(self, call: "_Call") -> None:
        """Give vLLM as many requests as it may have."""
        while call.waiting and len(call.in_flight) < self._most_in_flight(call):
            request, num_exits = call.waiting.popleft()
            ask_id = str(next(self._ask_ids))
            answer = self._start_answer(request, num_exits)
            adapter = self._find_adapter(request)
            answer.rank = self._ranks.take(unit_key(request, self.limits.prefix_unit, adapter))
            call.in_flight[ask_id] = answer
            ask = build_ask(request, self._end_token_ids, adapter=adapter, rank=answer.rank)
            call.process.ask(ask_id, ask, call.replies)

    def _most_in_flight(self, call: "_Call") -> int:
        num_exits = max([call.waiting[0][1], *(answer.num_exits for answer in call.in_flight.values())])
        return (self.max_in_flight, max(1, self.max_in_flight // SUSPECT_SHARE), 1)[min(num_exits, 2)]

    def _receive(self, call: "_Call") -> Iterator[Completion]:
        """Wait for the next update, unless nothing is in flight."""
        if not call.in_flight:
            return
        update = call.replies.get()
        if update is None:
            return
        if isinstance(update, EngineExit):
            if update is call.process.exit:  # else its process was replaced already
                yield from self._recover(call, update.cause)
        elif (answer := call.in_flight.get(update.ask_id)) is not None:
            error = answer.extend(update)
            if error is not None or answer.finish_reason is not None:
                call.num_exits = 0
                del call.in_flight[update.ask_id]
                self._ranks.give_back([answer.rank])
                if not update.is_last:
                    call.process.withdraw([update.ask_id])
                yield self._complete(answer, error)

    def _recover(self, call: "_Call", cause: str) -> Iterator[Completion]:
        """Start another process; what was in flight waits again, but a request alone at its second exit fails."""
        call.num_exits += 1
        if call.num_exits >= MAX_FRUITLESS_RESTARTS:
            raise EngineLoadError(f"vLLM died {call.num_exits} times without an answer: {cause}")
        lost = list(call.in_flight.values())
        call.in_flight.clear()
        self._ranks.give_back(answer.rank for answer in lost)
        if len(lost) == 1 and lost[0].num_exits > 0:
            yield self._complete(lost.pop(), EngineFailed(f"vLLM dies over this request: {cause}"))
        call.waiting.extendleft((answer.request, answer.num_exits + 1) for answer in reversed(lost))
        call.process = self._supervisor.running()

    def _start_answer(self, request: Request, num_exits: int = 0) -> "_Answer":
        stop = request.sampling.stop
        is_stopped = StopStrings(stop, self._tokenizer) if stop else None
        return _Answer(request, self._end_token_ids, is_stopped, num_exits)

    def _check_request(self, request: Request) -> RowError | None:
        """Why a request cannot run at all; vLLM would cut `max_tokens` in silence instead."""
        return why_not_runnable(
            request.prompt_token_ids,
            request.sampling.max_tokens,
            vocab_size=self.limits.vocab_size,
            context_length=self.limits.max_model_len,
        )

    def _complete(self, answer: "_Answer", error: RowError | None) -> Completion:
        request = answer.request
        finish_reason = "error" if error is not None else answer.finish_reason or "length"
        if error is None:
            self.prefixes.count_hit(answer.cached_tokens or 0)
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
            model=request.options.model if request.options.model in self._adapters else self.config.name,
            model_revision=self.config.revision,
            logprobs=tuple(answer.logprobs) if request.sampling.logprobs and error is None else None,
            top_logprobs=self._name_tokens(answer) if request.sampling.top_logprobs and error is None else None,
            reasoning_content=said.reasoning_content,
            tool_calls=said.tool_calls,
            repaired=said.repaired,
            error=error or said.error,
        )

    def _name_tokens(self, answer: "_Answer") -> tuple[tuple[TokenLogprob, ...], ...]:
        most = answer.request.sampling.top_logprobs
        return tuple(
            tuple(
                TokenLogprob(self._tokenizer.decode([token_id], skip_special_tokens=False), logprob)
                for token_id, logprob in likeliest[:most]
            )
            for likeliest in answer.top_logprobs
        )


@dataclass(slots=True)
class _Answer:
    """An answer as it grows; `token_ids` end with the end token or the stop string, where there is one."""

    request: Request
    end_token_ids: frozenset[int]
    is_stopped: StopStrings | None
    num_exits: int = 0
    rank: int | None = None
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    start: float = field(default_factory=time.perf_counter)
    cached_tokens: int | None = None
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    top_logprobs: list[Sequence[tuple[int, float]]] = field(default_factory=list[Sequence[tuple[int, float]]])
    finish_reason: FinishReason | None = None

    def extend(self, update: TokenUpdate) -> EngineFailed | None:
        """Take more tokens, up to the answer's end; a failure if vLLM ended before the answer did."""
        if update.error is not None:
            return EngineFailed(f"vLLM refused the request: {update.error}")
        if update.cached_tokens is not None:
            self.cached_tokens = update.cached_tokens
        for position, token_id in enumerate(update.token_ids):
            if self.finish_reason is None:
                self._append(token_id)
                if update.logprobs is not None:
                    self.logprobs.append(update.logprobs[position])
                if update.top_logprobs is not None:
                    self.top_logprobs.append(update.top_logprobs[position])
        if self.finish_reason is None and update.finish_reason is not None:
            if update.finish_reason not in ("stop", "length"):
                return EngineFailed(
                    f"vLLM ended the answer after {len(self.token_ids)} tokens, its reason: {update.finish_reason!r}"
                )
            self.finish_reason = update.finish_reason
        return None

    def _append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if token_id in self.end_token_ids or (self.is_stopped is not None and self.is_stopped(self.token_ids)):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.request.sampling.max_tokens:
            self.finish_reason = "length"


@dataclass(slots=True)
class _Call:
    """What one `generate` has pulled and not answered; waiting requests with the exits they were in flight at."""

    source: Iterator[Request]
    process: VllmProcess
    replies: Replies = field(default_factory=lambda: SimpleQueue[TokenUpdate | EngineExit | None]())
    waiting: deque[tuple[Request, int]] = field(default_factory=lambda: deque[tuple[Request, int]]())
    in_flight: dict[str, _Answer] = field(default_factory=dict[str, _Answer])
    is_exhausted: bool = False
    num_exits: int = 0


def load_vllm_runner(config: EngineConfig) -> VllmRunner:
    """Load a checkpoint folder into a vLLM of its own; nothing is ever fetched, and no code of the checkpoint is run.

    Args:
        config: a `device` that vLLM was not built for is refused; `batch_size` is vLLM's `max_num_seqs`.
    Raises:
        EngineLoadError: no interpreter has vLLM, or the folder, the device or an argument cannot be used.
    """
    options = config.options_as(VllmOptions)
    if not storage.is_local(config.path) or not storage.is_folder(config.path):
        raise EngineLoadError(f"{config.path}: expected a local folder with a checkpoint, found none")
    if options.dtype not in _DTYPES:
        raise EngineLoadError(f"expected dtype {', '.join(sorted(_DTYPES))}, found {options.dtype!r}")
    found = read_model_config(config.path, options.max_model_len, checks_rope=False)
    tokenizer = read_tokenizer(config.path)
    encoding = load_encoding(config.path, options.encoding)
    runner = VllmRunner(
        config,
        python=_find_python(),
        engine_arguments=build_engine_arguments(config, found.values),
        tokenizer=tokenizer,
        encoding=encoding,
        end_token_ids=read_end_token_ids(config.path, tokenizer, encoding),
    )
    if options.device != "auto" and options.device.partition(":")[0] != runner.limits.device:
        runner.close()
        raise EngineLoadError(f"expected a vLLM for device {options.device!r}, found one for {runner.limits.device!r}")
    limits = runner.limits
    _LOGGER.info(
        "vLLM %s on %s: prefixes hit every %s tokens (blocks of %s); answers %s",
        *(limits.version, limits.device, limits.hit_unit, limits.block_size, runner.determinism().promise),
    )
    return runner


def _find_python() -> str:
    """The interpreter that has vLLM."""
    if python := os.environ.get(PYTHON_VARIABLE):
        return python
    if find_spec("vllm") is not None:
        return sys.executable
    raise EngineLoadError(
        f"engine 'vllm' needs vLLM: install it into an environment of its own and set {PYTHON_VARIABLE} to that "
        "environment's python, or install it beside moebeam"
    )
