"""The `fake` engine: scripted answers and failures, for dry runs and tests.

Replaces a model in *answer*. A script is a JSON file:

    {"default": {"text": "{}"}, "latency_ms": 0, "rules": [
        {"contains": "urgent", "text": "{\\"priority\\": \\"urgent\\"}"},
        {"pattern": "^\\\\s*$", "failure": "refused", "message": "nothing to read"},
        {"contains": "overload", "attempt": 1, "failure": "engine_overloaded"}]}

The first rule that matches the last user message (and the attempt and the sample, if it names them) gives the reply.
"""

import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.fake_engine.options import FakeOptions
from moebeam.model_runner.prefix_tree import common_prefix_length
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.canonical import canonical_json
from moebeam.schemas.determinism import Determinism
from moebeam.schemas.errors import EngineLoadError, RowError
from moebeam.schemas.records import Completion, FinishReason, Request, TokenIds, ToolCall, Usage
from moebeam.schemas.store import storage

PROVIDER = "fake"
FAILURES: dict[str, type[RowError]] = {
    error.error_type: error for error in RowError.__subclasses__() if error.error_stage == "run"
}
"""Values of a reply's `failure`."""

_CHARACTERS_PER_TOKEN = 4


class Call(BaseModel):
    """A scripted function call; `arguments` is JSON text or an object."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    arguments: str | dict[str, Any]

    @property
    def arguments_text(self) -> str:
        if isinstance(self.arguments, str):
            return self.arguments
        return json.dumps(self.arguments, ensure_ascii=False)


class Reply(BaseModel):
    """One scripted answer or failure.

    An `accident` hits the whole engine: its process is killed or hangs.

    Without `text` the answer is `{"echo": ..., "num_prompt_tokens": ...}`. Without `cached_tokens` an ideal prefix
    cache is simulated; null means unknown. Given token counts are reported unchanged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str | None = None
    finish_reason: FinishReason | None = None
    failure: str | None = None
    accident: Literal["crash", "hang"] | None = None
    message: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[Call, ...] = ()
    cached_tokens: int | None = Field(default=None, ge=0)
    completion_tokens: int | None = Field(default=None, ge=0)

    @field_validator("failure")
    @classmethod
    def _check_failure(cls, value: str | None) -> str | None:
        if value is not None and value not in FAILURES:
            raise ValueError(f"expected one of {', '.join(sorted(FAILURES))}, found {value!r}")
        return value

    @model_validator(mode="after")
    def _check_message(self) -> Self:
        if self.message is not None and self.failure is None:
            raise ValueError("`message` belongs to a `failure`")
        return self


class Rule(Reply):
    """A reply, and the last user message, attempt and sample that it applies to."""

    contains: str | None = None
    pattern: str | None = None
    attempt: int | None = Field(default=None, ge=1)
    sample: int | None = Field(default=None, ge=0)

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"expected a regular expression, found {value!r}: {error}") from error
        return value

    @model_validator(mode="after")
    def _check_condition(self) -> Self:
        if self.contains is not None and self.pattern is not None:
            raise ValueError("give `contains` or `pattern`, not both")
        if self.contains is None and self.pattern is None and self.attempt is None and self.sample is None:
            raise ValueError("give `contains`, `pattern`, `attempt` or `sample`: a rule without any would always match")
        return self

    def is_match(self, text: str, attempt: int, sample: int) -> bool:
        """Whether the rule applies to a last user message, an attempt and a sample."""
        if self.attempt not in (None, attempt) or self.sample not in (None, sample):
            return False
        if self.contains is not None:
            return self.contains in text
        return self.pattern is None or re.search(self.pattern, text) is not None


class Script(BaseModel):
    """All replies of a fake engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    default: Reply = Field(default_factory=Reply)
    rules: tuple[Rule, ...] = ()
    latency_ms: float = Field(default=0.0, ge=0, description="Waited before each answer, and reported as it is")


@dataclass(frozen=True, slots=True, weakref_slot=True)
class FakeRunner:
    """Answers from a script, one request at a time, in order.

    `encoder` counts tokens; without one, four characters are a token. `cached_tokens` is the prefix that a request
    shares with the tenant's previous one in the same `generate` call: a perfect cache fed in token order.
    """

    config: EngineConfig
    script: Script
    encoder: PromptEncoder | None = None
    _is_given_back: threading.Event = field(default_factory=threading.Event, compare=False)

    def give_back(self) -> None:
        """See `StoppableRunner`: no further answer begins, and one that waits for its latency has none."""
        self._is_given_back.set()

    def determinism(self) -> Determinism:
        """See `PromisingRunner`."""
        return Determinism("bitwise", "scripted answers", is_seeded=True)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer each request as it is pulled; pulls nothing ahead."""
        last_token_ids: dict[str, TokenIds] = {}
        for request in requests:
            if request.earlier is None and self._wait_for_latency():
                return
            before = last_token_ids.get(request.tenant)
            num_shared = 0 if before is None else common_prefix_length(before, request.prompt_token_ids)
            last_token_ids[request.tenant] = request.prompt_token_ids
            yield request.earlier or self._answer(request, num_shared)

    def _wait_for_latency(self) -> bool:
        """Whether the engine was given back, before or meanwhile."""
        latency_s = self.script.latency_ms / 1000
        return self._is_given_back.wait(latency_s) if latency_s else self._is_given_back.is_set()

    def _answer(self, request: Request, num_shared: int) -> Completion:
        # The latency has passed by now.
        started_at = datetime.now(UTC) - timedelta(milliseconds=self.script.latency_ms)
        reply = self._reply_to(request)
        _have_accident(reply.accident)
        error: RowError | None = None
        calls: tuple[ToolCall, ...] = ()
        finish_reason: FinishReason = reply.finish_reason or "stop"
        if reply.failure is not None:
            error = FAILURES[reply.failure](reply.message or f"scripted failure: {reply.failure}")
            finish_reason = reply.finish_reason or "error"
            text, num_completion, num_reasoning = reply.text or "", 0, 0
        else:
            _, num_reasoning = self._truncate(reply.reasoning_content or "", None)
            max_tokens = max(0, request.sampling.max_tokens - num_reasoning)
            echo = "" if reply.tool_calls else _format_echo(request.prompt_token_ids)
            whole = echo if reply.text is None else reply.text
            text, num_visible = self._truncate(whole, max_tokens)
            num_completion = num_reasoning + num_visible
            calls, num_called = self._read_calls(reply)
            num_completion += num_called
            if text != whole:
                finish_reason = "length"
            elif calls and reply.finish_reason is None:
                finish_reason = "tool_calls"
        if reply.completion_tokens is not None:
            num_completion = reply.completion_tokens
            num_reasoning = min(num_reasoning, num_completion)
        return Completion(
            request_id=request.request_id,
            text=text,
            finish_reason=finish_reason,
            usage=Usage(
                prompt_tokens=request.num_prompt_tokens,
                completion_tokens=num_completion,
                cached_tokens=reply.cached_tokens if "cached_tokens" in reply.model_fields_set else num_shared,
                reasoning_tokens=num_reasoning,
            ),
            started_at=started_at,
            latency_ms=self.script.latency_ms,
            provider=PROVIDER,
            model=self.config.name,
            model_revision=self.config.revision,
            reasoning_content=reply.reasoning_content,
            tool_calls=calls,
            error=error,
        )

    def _read_calls(self, reply: Reply) -> tuple[tuple[ToolCall, ...], int]:
        """The scripted calls and their number of tokens."""
        calls = tuple(
            ToolCall(f"call_{index}", call.name, call.arguments_text) for index, call in enumerate(reply.tool_calls)
        )
        return calls, sum(self._truncate(call.name + call.arguments, None)[1] for call in calls)

    def _reply_to(self, request: Request) -> Reply:
        if not self.script.rules:
            return self.script.default
        text = next((message.content for message in reversed(request.messages) if message.role == "user"), "")
        for rule in self.script.rules:
            if rule.is_match(text, request.attempt, request.sample):
                return rule
        return self.script.default

    def _truncate(self, text: str, max_tokens: int | None) -> tuple[str, int]:
        """Truncate to `max_tokens` tokens; returns the text and its number of tokens."""
        if self.encoder is None:
            num_tokens = -(-len(text) // _CHARACTERS_PER_TOKEN)
            if max_tokens is None or num_tokens <= max_tokens:
                return text, num_tokens
            return text[: max_tokens * _CHARACTERS_PER_TOKEN], max_tokens
        token_ids = _encode(self.encoder, text)
        if max_tokens is None or token_ids.shape[0] <= max_tokens:
            return text, int(token_ids.shape[0])
        return self.encoder.decode(token_ids[:max_tokens]), max_tokens


def load_fake_runner(config: EngineConfig) -> FakeRunner:
    """Read the script, if any, and the tokenizer, if the configuration has a checkpoint path.

    Raises:
        EngineLoadError: script or tokenizer cannot be read; names file and field.
    """
    options = config.options_as(FakeOptions)
    script = Script() if options.script is None else _read_script(options.script)
    return FakeRunner(config, script, PromptEncoder.load(config.path) if config.path else None)


def _read_script(path: str) -> Script:
    try:
        content = storage.read_bytes(path)
    except OSError as error:
        raise EngineLoadError(f"{path}: expected a script of the fake engine, found: {error}") from error
    try:
        return Script.model_validate_json(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        )
        raise EngineLoadError(f"{path}: not a script of the fake engine: {problems}") from error


@lru_cache(maxsize=1024)
def _encode(encoder: PromptEncoder, text: str) -> TokenIds:
    """Tokenize each text once; scripts repeat texts."""
    return encoder.encode_batch([text])[0]


def _have_accident(accident: Literal["crash", "hang"] | None) -> None:
    if accident == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    elif accident == "hang":
        threading.Event().wait()


def _format_echo(token_ids: TokenIds) -> str:
    digest = hashlib.sha256(token_ids.astype(np.dtype("<i4")).tobytes()).hexdigest()
    return canonical_json({"echo": digest[:16], "num_prompt_tokens": int(token_ids.shape[0])})
