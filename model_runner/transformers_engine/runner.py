"""The `transformers` engine: any Hugging Face causal language model, in process; slow, simple, the oracle.

Stands inside the *answer* stage. Nothing is cached between requests and nothing is padded, because `transformers` 5.23
answers wrongly for DeepSeek V4 with left padding. Prompts of nearly one length run in lockstep instead: together up to
the end of the shortest, then one token a step, which is a longer prompt's next token until that prompt is through.
In float32 a greedy answer is the same alone and in a batch; in bfloat16 the batch's shape changes rounding and may
change a token. A `batch_size` of 1 is plain `generate`.

A request's grammar narrows its row's logits before each token, as in the `torch` engine; tokens that it forces are
drawn like others, there being no other to draw.
"""

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from threading import Event
from typing import Any

import numpy as np
import tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from moebeam.model_runner.checkpoint.files import read_tokenizer
from moebeam.model_runner.checkpoint.model_config import load_transformers_config, read_model_config
from moebeam.model_runner.checkpoint.prompt_limits import why_not_runnable
from moebeam.model_runner.encoding.answer_text import AnswerReader
from moebeam.model_runner.encoding.chat_encoding import ChatEncoding, load_encoding
from moebeam.model_runner.encoding.end_tokens import read_end_token_ids
from moebeam.model_runner.grammar.constraint import Constraint, ConstraintCompiler, MaskFiller
from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.seeds import derive_seed
from moebeam.model_runner.torch_engine.accelerators import pick_device
from moebeam.model_runner.transformers_engine.growing_answers import (
    AllowedTokens,
    ForcePrompt,
    GrowingAnswer,
    Penalties,
    StopWhenAnswered,
)
from moebeam.model_runner.transformers_engine.loaded_models import check_loaded, find_ropes_by_length
from moebeam.model_runner.transformers_engine.options import TransformersOptions
from moebeam.schemas.determinism import Determinism, promise_of_arithmetic
from moebeam.schemas.errors import EngineFailed, EngineLoadError, RowError
from moebeam.schemas.records import Completion, Request, Usage
from moebeam.schemas.store import storage

PROVIDER = "local"
NUM_WINDOW_REQUESTS = 512
"""Most requests that wait in the engine; the more, the closer in length are those that run together."""

MAX_LENGTH_SPREAD = 32
"""Most tokens by which prompts in a batch differ in length: each costs a step that prefill would not."""

DEFAULT_BATCH_SIZE = 16
_DTYPES: dict[str, str | torch.dtype] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16}


class TransformersRunner:
    """A loaded causal language model. `usage.cached_tokens` is always 0."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        model: Any,
        tokenizer: tokenizers.Tokenizer,
        encoding: ChatEncoding,
        context_length: int,
    ) -> None:
        options = config.options_as(TransformersOptions)
        self.config = config
        self._model = model
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(read_end_token_ids(config.path, tokenizer, encoding))
        self._reader = AnswerReader(tokenizer, encoding, self._eos_token_ids)
        self._context_length = context_length
        self._ropes = find_ropes_by_length(model)
        self._num_embeddings = int(model.get_input_embeddings().weight.shape[0])
        self._device = model.device
        self._batch_size = options.batch_size or DEFAULT_BATCH_SIZE
        self.claim: object = None
        self._is_given_back = Event()

    def give_back(self) -> None:
        """See `StoppableRunner`; the token that is being computed is still finished."""
        self._is_given_back.set()

    def determinism(self) -> Determinism:
        """See `PromisingRunner`."""
        return promise_of_arithmetic(str(self._model.dtype).removeprefix("torch."), self._device.type)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests, pulling at most `NUM_WINDOW_REQUESTS` ahead of the answers.

        Sampled requests run one at a time, so that their random numbers are their own.
        """
        source = iter(requests)
        waiting: list[Request] = []
        is_exhausted = False
        while not self._is_given_back.is_set():
            while not is_exhausted and len(waiting) < NUM_WINDOW_REQUESTS:
                request = next(source, None)
                if request is None:
                    is_exhausted = True
                elif (error := self._refusal(request)) is not None:
                    yield self._failure(request, error)
                elif request.sampling.is_greedy:
                    waiting.append(request)
                else:
                    yield from self._complete([request])
            if not waiting:
                return
            waiting.sort(key=lambda request: request.num_prompt_tokens)
            max_spread = 0 if self._ropes else MAX_LENGTH_SPREAD
            lengths = [request.num_prompt_tokens for request in waiting]
            first, end = next_batch(lengths, self._batch_size, max_spread)
            batch = waiting[first:end]
            del waiting[first:end]
            yield from self._complete(batch)

    @cached_property
    def _compiler(self) -> ConstraintCompiler:
        """Made for the first request with a grammar: reading a vocabulary takes a second."""
        return ConstraintCompiler(self._tokenizer, self._num_embeddings, sorted(self._eos_token_ids))

    @cached_property
    def _masks(self) -> MaskFiller:
        return MaskFiller(self._num_embeddings, num_threads=1)

    def _compile_constraint(self, request: Request) -> Constraint | None:
        """The constraint of a new answer.

        Raises:
            InvalidGrammar: the request's grammar cannot be compiled.
        """
        return None if request.grammar is None else self._compiler.compile(request.grammar)

    def _refusal(self, request: Request) -> RowError | None:
        """Why a request cannot run at all; found before it could break a batch."""
        reason = why_not_runnable(
            request.prompt_token_ids,
            request.sampling.max_tokens,
            vocab_size=self._num_embeddings,
            context_length=self._context_length,
        )
        if reason is None:
            try:
                self._compile_constraint(request)
            except RowError as error:
                return error
        return reason

    def _complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
        """Run a batch; if it fails, each request alone, so that only the one at fault fails.

        Requests that are given back have no completion.
        """
        if self._is_given_back.is_set():
            return
        started_at, start = datetime.now(UTC), time.perf_counter()
        failure: EngineFailed | None = None
        answers: list[GrowingAnswer] = []
        try:
            answers = self._run(batch)
        except RuntimeError as error:  # out of memory is one, too
            failure = EngineFailed(f"the model failed: {type(error).__name__}: {error}")
        # Past the handler, so that the error's frames no longer hold the batch's tensors.
        if failure is not None and len(batch) > 1:
            for request in batch:
                yield from self._complete([request])
            return
        latency_ms = (time.perf_counter() - start) * 1000
        if failure is not None:
            yield self._failure(batch[0], failure, started_at, latency_ms)
        for request, growing in zip(batch, answers, strict=failure is None):
            if growing.finish_reason is None and self._is_given_back.is_set():
                continue
            answer = self._reader.read(request, growing.token_ids, growing.finish_reason or "length")
            usage = Usage(request.num_prompt_tokens, len(growing.token_ids), 0, answer.num_reasoning_tokens)
            yield Completion(
                request_id=request.request_id,
                text=answer.text,
                finish_reason=answer.finish_reason,
                usage=usage,
                started_at=started_at,
                latency_ms=latency_ms,
                provider=PROVIDER,
                model=self.config.name,
                model_revision=self.config.revision,
                reasoning_content=answer.reasoning_content,
                tool_calls=answer.tool_calls,
                repaired=answer.repaired,
                error=growing.error or answer.error,
            )

    def _failure(
        self, request: Request, error: RowError, started_at: datetime | None = None, latency_ms: float = 0.0
    ) -> Completion:
        return Completion.from_error(
            request.request_id,
            error,
            usage=Usage(request.num_prompt_tokens, 0, cached_tokens=0),
            started_at=started_at,
            latency_ms=latency_ms,
            provider=PROVIDER,
            model=self.config.name,
            model_revision=self.config.revision,
        )

    def _run(self, batch: Sequence[Request]) -> list[GrowingAnswer]:
        """Generate for greedy requests of nearly one length, or for one sampled request."""
        prompts = [request.prompt_token_ids for request in batch]
        num_common = min(prompt.shape[0] for prompt in prompts)
        shortened = np.stack([prompt[:num_common] for prompt in prompts])
        input_ids = torch.from_numpy(shortened).to(self._device, torch.long)  # (num_requests, num_common)
        answers = [
            GrowingAnswer(request.sampling, self._tokenizer, self._eos_token_ids, self._compile_constraint(request))
            for request in batch
        ]
        num_steps = max(request.num_prompt_tokens + request.sampling.max_tokens for request in batch) - num_common
        settings = GenerationConfig(max_new_tokens=num_steps, do_sample=False)
        sampling = batch[0].sampling
        if not sampling.is_greedy:
            settings.update(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
            settings.update(min_p=sampling.min_p or None)
        processors: list[LogitsProcessor] = [ForcePrompt(prompts), Penalties(answers)]
        if any(answer.constraint is not None for answer in answers):
            processors.append(AllowedTokens(prompts, answers, self._masks))
        seed = None if sampling.is_greedy else derive_seed(batch[0])
        for rope in self._ropes:
            rope.reset()
        with torch.inference_mode(), _silence_transformers(), _seed_rng(self._device, seed):
            self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList([StopWhenAnswered(prompts, answers, self._is_given_back)]),
            )
        return answers


def next_batch(lengths: Sequence[int], batch_size: int, max_spread: int = MAX_LENGTH_SPREAD) -> tuple[int, int]:
    """Which of the waiting prompts run next, as a half-open range.

    Args:
        lengths: prompt lengths, ascending, at least one.
        batch_size: most prompts that run together.
        max_spread: most tokens by which they may differ.
    Returns:
        The most prompts that differ by at most `max_spread` tokens; of equally many, those closest in length.
    """
    best, best_rank = (0, 1), (0, 0)
    end = 0
    for first in range(len(lengths)):
        while end < len(lengths) and end - first < batch_size and lengths[end] - lengths[first] <= max_spread:
            end += 1
        rank = (end - first, lengths[first] - lengths[end - 1])
        if first == 0 or rank > best_rank:
            best, best_rank = (first, end), rank
    return best


def load_transformers_runner(config: EngineConfig) -> TransformersRunner:
    """Load a checkpoint folder; nothing is ever fetched, and no code of the checkpoint is run.

    Args:
        config: `device` `auto` takes torch's accelerator, else the CPU; `dtype` `auto` is the checkpoint's.
    Raises:
        EngineLoadError: the folder, the device or the dtype cannot be used.
    """
    options = config.options_as(TransformersOptions)
    if not storage.is_local(config.path) or not storage.is_folder(config.path):
        raise EngineLoadError(f"{config.path}: expected a local folder with a checkpoint, found none")
    if options.dtype not in _DTYPES:
        raise EngineLoadError(f"expected dtype {', '.join(_DTYPES)}, found {options.dtype!r}")
    found = read_model_config(config.path, options.max_model_len)
    tokenizer = read_tokenizer(config.path)
    encoding = load_encoding(config.path, options.encoding)
    taken = pick_device(options.device)
    try:
        with _silence_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                config.path,
                config=load_transformers_config(found),
                dtype=_DTYPES[options.dtype],
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            model, loading = loaded
            check_loaded(model, loading, config.path)
            model = model.to(taken.device).eval()
            _check_forward(model)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise EngineLoadError(
            f"{config.path}: expected a checkpoint that transformers can load on {options.device!r}, "
            f"found: {type(error).__name__}: {error}"
        ) from error
    # `generate` fills what a call leaves open from here: a checkpoint's own temperature or penalties must not leak in.
    model.generation_config = GenerationConfig()
    runner = TransformersRunner(
        config, model=model, tokenizer=tokenizer, encoding=encoding, context_length=found.context_length
    )
    runner.claim = taken.claim
    return runner


def _check_forward(model: Any) -> None:
    """Run two tokens; experts fall back to a loop where the grouped matrix product does not work on this device."""
    input_ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids)
    except RuntimeError:
        model.set_experts_implementation("eager")
        with torch.inference_mode():
            model(input_ids)


@contextmanager
def _seed_rng(device: torch.device, seed: int | None) -> Generator[None]:
    """Run with torch's random numbers seeded, on the CPU and on `device`, and put them back; None changes nothing."""
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    kind: dict[str, Any] = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng(devices, **kind):
        torch.manual_seed(seed)
        yield


@contextmanager
def _silence_transformers() -> Generator[None]:
    """No progress bars and no advice from `transformers` meanwhile: a worker's log belongs to the job."""
    verbosity = transformers_logging.get_verbosity()
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()
