"""The `torch` engine: our own, in process, for DeepSeek-V3, R1 and V4 and other mixture-of-experts models.

Stands inside the *answer* stage. Requests become prompts of token ids, `torch_engine` answers them from a planned
prefix tree, answers become texts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime

import tokenizers

from moebeam.model_runner.checkpoint.files import read_tokenizer
from moebeam.model_runner.encoding.answer_text import AnswerReader, StopStrings
from moebeam.model_runner.encoding.chat_encoding import ChatEncoding, load_encoding
from moebeam.model_runner.encoding.end_tokens import read_end_token_ids
from moebeam.model_runner.grammar.constraint import ConstraintCompiler
from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.seeds import derive_seed
from moebeam.model_runner.torch_engine.engine import TorchEngine
from moebeam.model_runner.torch_engine.options import TorchOptions
from moebeam.model_runner.torch_engine.schedule.sequences import Finished, Prompt
from moebeam.schemas.determinism import Determinism, promise_of_arithmetic
from moebeam.schemas.errors import RowError
from moebeam.schemas.records import Completion, Request, Usage

PROVIDER = "local"


class TorchRunner:
    """A loaded model behind `ModelRunner`."""

    def __init__(
        self,
        config: EngineConfig,
        engine: TorchEngine,
        tokenizer: tokenizers.Tokenizer,
        encoding: ChatEncoding,
        end_token_ids: Iterable[int],
    ) -> None:
        self.config = config
        self.engine = engine
        self._tokenizer = tokenizer
        self._end_token_ids = frozenset(end_token_ids)
        self._reader = AnswerReader(tokenizer, encoding, self._end_token_ids)
        self._compiler = ConstraintCompiler(tokenizer, engine.model.vocab_size, sorted(self._end_token_ids))

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests in the order of their prefix tree, each as soon as it is done."""
        waiting: dict[str, Request] = {}
        refused: list[tuple[Request, RowError]] = []
        for finished in self.engine.run(self._prompts(requests, waiting, refused)):
            yield from self._refusals(refused)
            request = waiting.pop(finished.prompt_id)
            yield request.earlier or self._completion(request, finished)
        yield from self._refusals(refused)

    def give_back(self) -> None:
        """See `StoppableRunner`; the step that is being computed is still finished."""
        self.engine.stop()

    def counters(self) -> dict[str, float]:
        """See `CountingRunner`; seconds by phase are `plan_s`, `extend_s`, `sample_s` and `retire_s`, seconds by CPU
        threads `threads_1_s` and so on."""
        values = asdict(self.engine.counters)
        seconds: dict[str, float] = values.pop("seconds")
        by_threads: dict[int, float] = values.pop("seconds_by_threads")
        return {
            **values,
            **{f"{phase}_s": value for phase, value in seconds.items()},
            **{f"threads_{num}_s": value for num, value in by_threads.items()},
        }

    def determinism(self) -> Determinism:
        """See `PromisingRunner`."""
        placement = self.engine.placement
        return promise_of_arithmetic(str(placement.dtype).removeprefix("torch."), placement.device.type)

    def _prompts(
        self, requests: Iterable[Request], waiting: dict[str, Request], refused: list[tuple[Request, RowError]]
    ) -> Iterator[Prompt]:
        for request in requests:
            sampling = request.sampling
            try:
                grammar = request.grammar if request.earlier is None else None
                constraint = None if grammar is None else self._compiler.compile(grammar)
            except RowError as error:
                refused.append((request, error))
                continue
            waiting[request.request_id] = request
            yield Prompt(
                prompt_id=request.request_id,
                token_ids=request.prompt_token_ids,
                max_tokens=sampling.max_tokens,
                sampling=sampling,
                stop_token_ids=self._end_token_ids,
                tenant=request.tenant,
                seed=derive_seed(request),
                is_over=StopStrings(sampling.stop, self._tokenizer) if sampling.stop else None,
                constraint=constraint,
                is_answered=request.earlier is not None,
            )

    def _refusals(self, refused: list[tuple[Request, RowError]]) -> Iterator[Completion]:
        while refused:
            request, error = refused.pop(0)
            yield self._completion(request, Finished(request.request_id, [], "error", error=error))

    def _completion(self, request: Request, finished: Finished) -> Completion:
        answer = self._reader.read(request, finished.token_ids, finished.finish_reason)
        started_at = datetime.fromtimestamp(finished.admitted_s, UTC) if finished.admitted_s else datetime.now(UTC)
        num_cached = finished.num_cached_tokens
        return Completion(
            request_id=request.request_id,
            text=answer.text,
            finish_reason=answer.finish_reason,
            usage=Usage(request.num_prompt_tokens, len(finished.token_ids), num_cached, answer.num_reasoning_tokens),
            started_at=started_at,
            latency_ms=max(0.0, finished.finished_s - finished.admitted_s) * 1000,
            provider=PROVIDER,
            model=self.config.name,
            model_revision=self.config.revision,
            logprobs=tuple(finished.logprobs) if request.sampling.logprobs and not finished.error else None,
            reasoning_content=answer.reasoning_content,
            tool_calls=answer.tool_calls,
            repaired=answer.repaired,
            error=finished.error or answer.error,
        )


def load_torch_runner(config: EngineConfig) -> TorchRunner:
    """Load a checkpoint into the torch engine.

    Raises:
        EngineLoadError: the checkpoint is missing, damaged, or of a model that the engine does not know.
    """
    options = config.options_as(TorchOptions)
    tokenizer = read_tokenizer(config.path)
    encoding = load_encoding(config.path, options.encoding)
    end_token_ids = read_end_token_ids(config.path, tokenizer, encoding)
    engine = TorchEngine.load(
        config.path,
        dtype=options.dtype,
        device=options.device,
        batch_size=options.batch_size,
        max_cache_bytes=options.max_cache_bytes,
        max_weight_bytes=options.max_weight_bytes,
        max_model_len=options.max_model_len,
    )
    return TorchRunner(config, engine, tokenizer, encoding, end_token_ids)
