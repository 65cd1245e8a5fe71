"""The lines of a batch: requests as they are uploaded, answers and errors as they come back.

Part of the `openai` engine in batch mode; `service.py` sends the files. Each line's id is a digest of all that it
asks, so that our batches can be recognised at the provider, and no id of the input is sent.
"""

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Annotated, Any

import httpx2
import openai
from pydantic import BaseModel, ConfigDict, Field

from moebeam.model_runner.openai_engine.failures import CallFailure, classify_failure, shorten
from moebeam.model_runner.openai_engine.profiles import Profile
from moebeam.model_runner.openai_engine.request_body import chat_body
from moebeam.model_runner.openai_engine.responses import Answer, parse_json, read_answer
from moebeam.model_runner.openai_engine.transport.bounds import bound_answer, bound_file_line
from moebeam.schemas.canonical import fingerprint
from moebeam.schemas.errors import ContentRefused, EngineFailed, EngineTimeout, MalformedResponse, RequestRefused
from moebeam.schemas.records import Request, Sampling
from moebeam.schemas.store.named_errors import naming_file

CHAT_URL = "/v1/chat/completions"
MAX_LINES = 50_000
MAX_BYTES = 100_000_000
"""What every provider takes: OpenAI up to 200 MB, Alibaba 500 MB, Together 100 MB."""

DIGEST_KEY = "moebeam"
_SKETCH_KEY = "moebeam_lines_"
_NUM_SKETCH_KEYS = 14
_SKETCHES_A_KEY = 64
_SKETCH_CHARACTERS = 8
"""A batch's metadata has at most 16 keys of at most 512 characters."""

_REFUSED_CODES = frozenset({"invalid_request", "invalid_request_error", "context_length_exceeded"})
"""Codes without a status that speak of the line; all others, and none, may pass."""

_LOGGER = logging.getLogger(__name__)


@dataclass(slots=True)
class BatchWindow:
    """Requests that go out as one batch.

    Attributes:
        waiting: line id -> request id, of the requests without an outcome.
        num_prompt_tokens: request id -> its prompt's tokens, for answers whose provider does not count them.
        answered: line id of one that was answered, here or in a batch before; None while there is none.
        canary: a line like that one for a single token, among lines that go out again: it tells an outage from lines on
            which the provider fails alone.
        file: the lines, on disk and without a name.
        max_line_bytes, max_file_bytes: what the largest answer, and the files of all of them, can need.
    """

    file: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    waiting: dict[str, str] = field(default_factory=dict[str, str])
    num_prompt_tokens: dict[str, int] = field(default_factory=dict[str, int])
    num_bytes: int = 0
    answered: str | None = None
    canary: "Canary | None" = None
    max_line_bytes: int = 1 << 20
    max_file_bytes: int = 8 << 20

    def make_room(self, sampling: Sampling) -> None:
        """Let the files of answers be larger by what one request can need."""
        self.max_file_bytes += bound_file_line(sampling)
        most = bound_answer(sampling, is_stream=False, timeout_s=0.0).max_bytes
        self.max_line_bytes = max(self.max_line_bytes, most)

    def split_answers(self, file: IO[bytes]) -> Iterator[bytes]:
        """The lines of a file of answers; one that is too long is passed over."""
        while line := file.readline(self.max_line_bytes):
            if len(line) < self.max_line_bytes or line.endswith(b"\n"):
                yield line
                continue
            _LOGGER.warning("a line of more than %d bytes of a batch's file is passed over", self.max_line_bytes)
            while line and not line.endswith(b"\n"):
                line = file.readline(self.max_line_bytes)

    def has_room(self, line: bytes) -> bool:
        """Whether a line fits; the first one always does."""
        return not self.waiting or (len(self.waiting) < MAX_LINES and self.num_bytes + len(line) <= MAX_BYTES)

    def add(self, line_id: str, request_id: str, line: bytes) -> None:
        self.waiting[line_id] = request_id
        with naming_file(tempfile.gettempdir()):
            self.file.write(line)
        self.num_bytes += len(line)

    def remaining(self, max_tokens_field: str | None = None) -> "BatchWindow":
        """A window of the requests that still wait; this one's file is closed.

        Args:
            max_tokens_field: set where they go out again, so that a canary goes with them if there can be one.
        """
        rest = BatchWindow(
            canary=self.canary,
            num_prompt_tokens=self.num_prompt_tokens,
            max_line_bytes=self.max_line_bytes,
            max_file_bytes=self.max_file_bytes,
        )
        self.file.seek(0)
        for line in self.file:
            fields = json.loads(line)
            line_id = fields["custom_id"]
            if line_id in self.waiting:
                rest.add(line_id, self.waiting[line_id], line)
            elif line_id == self.answered and max_tokens_field is not None:
                rest.canary = Canary.from_line(fields, max_tokens_field)
        self.file.close()
        if rest.canary is not None and max_tokens_field is not None:
            rest.canary = rest.canary.renew()
            rest.file.write(rest.canary.line)
        return rest

    @property
    def metadata(self) -> dict[str, str]:
        """What a batch of these lines is found by: the digest of all, and of as many single lines as there is room for.

        After a crash only some of a batch's requests may be asked again, and those have another digest together.
        """
        shown = [line_id[:_SKETCH_CHARACTERS] for line_id in sorted(self.waiting)]
        keys = range(min(_NUM_SKETCH_KEYS, -(-len(shown) // _SKETCHES_A_KEY)))
        sketches = {
            f"{_SKETCH_KEY}{key}": "".join(shown[key * _SKETCHES_A_KEY : (key + 1) * _SKETCHES_A_KEY]) for key in keys
        }
        return {DIGEST_KEY: fingerprint(sorted(self.waiting)), **sketches}


@dataclass(frozen=True, slots=True)
class Canary:
    """A line whose answer nobody waits for.

    Attributes:
        number: how many of the same body went out before.
    """

    fields: Mapping[str, Any]
    number: int = 0

    @classmethod
    def from_line(cls, fields: Mapping[str, Any], max_tokens_field: str) -> "Canary":
        """The same line for one token."""
        return cls({**fields, "body": {**fields["body"], max_tokens_field: 1}})

    def renew(self) -> "Canary":
        """The same with an id of its own."""
        return Canary(self.fields, self.number + 1)

    @property
    def line_id(self) -> str:
        return fingerprint({"canary": self.number, "body": self.fields["body"]})[:40]

    @property
    def line(self) -> bytes:
        return _line_bytes({**self.fields, "custom_id": self.line_id})


def request_line(request: Request, profile: Profile, model: str, *, scope: str) -> tuple[str, bytes]:
    """A request's line id and its line.

    Args:
        scope: whose request it is; equal requests of two scopes have two ids.
    Raises:
        RequestRefused: the provider is known to refuse it.
        InvalidSampling: the model knows no such reasoning effort.
    """
    body = chat_body(request, profile, model, is_stream=False)
    line_id = fingerprint(
        {
            "scope": scope,
            "row": request.request_id,
            "attempt": request.attempt,
            "tenant": request.tenant,
            **({"run": request.own_draws} if request.own_draws else {}),
            "body": body.fields,
        }
    )[:40]
    line = {"custom_id": line_id, "method": "POST", "url": CHAT_URL, "body": body.fields}
    return line_id, _line_bytes(line)


def _line_bytes(line: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        # An answer that is shown to the model again may hold half of a surrogate pair, which only ASCII can spell.
        text = json.dumps(line, separators=(",", ":"), allow_nan=False).encode()
    return text + b"\n"


def may_hold(metadata: Mapping[str, str] | None, window: BatchWindow) -> bool:
    """Whether a batch may have lines of a window, by what its metadata shows of them.

    Certain for batches of up to 896 lines, and where the window is the batch; else a small rest of a large batch may
    be overlooked.
    """
    if not metadata or DIGEST_KEY not in metadata:
        return False
    if metadata[DIGEST_KEY] == window.metadata[DIGEST_KEY]:
        return True
    wanted = {line_id[:_SKETCH_CHARACTERS] for line_id in window.waiting}
    shown = "".join(value for key, value in metadata.items() if key.startswith(_SKETCH_KEY))
    places = range(0, len(shown), _SKETCH_CHARACTERS)
    return any(shown[place : place + _SKETCH_CHARACTERS] in wanted for place in places)


class _Response(BaseModel):
    status_code: Annotated[int, Field(ge=0, le=999)] = 0
    body: Any = None


class _LineError(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    code: str | None = None
    message: str | None = None


class _Line(BaseModel):
    custom_id: str
    response: _Response | None = None
    error: _LineError | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to a line, or why there is none."""

    line_id: str
    result: Answer | CallFailure


def read_outcomes(lines: Iterable[bytes], profile: Profile) -> Iterator[Outcome]:
    """Read a downloaded file; a line that cannot be read has no outcome, and its request goes on waiting."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            parsed = parse_json(_Line, line)
        except MalformedResponse as error:
            _LOGGER.warning("%s: line %d of a batch's file is passed over: %s", profile.name, number, error)
            continue
        yield Outcome(parsed.custom_id, _result(parsed, profile))


def _result(line: _Line, profile: Profile) -> Answer | CallFailure:
    response = line.response
    if response is not None and 200 <= response.status_code < 300:
        try:
            # Some gateways give the body as text.
            body = response.body if isinstance(response.body, str) else json.dumps(response.body)
            return read_answer(body.encode(errors="surrogatepass"), profile)
        except RecursionError:
            return classify_failure(MalformedResponse("body: expected a response, found one too deep"), profile)
        except MalformedResponse as error:
            return classify_failure(error, profile)
    if response is not None and response.status_code >= 400:
        return classify_failure(_status_error(response), profile)
    code = line.error.code if line.error is not None else None
    message = (line.error.message if line.error is not None else None) or "no reason given"
    text = shorten(f"{profile.name}: {code or 'error'}: {message}")
    if code in profile.stop_codes:
        return CallFailure("closed", EngineFailed(text))
    if code in profile.refusal_codes:
        return CallFailure("row", ContentRefused(text))
    if code in _REFUSED_CODES:
        return CallFailure("row", RequestRefused(text))
    return CallFailure("failed", EngineTimeout(text) if code == "batch_expired" else EngineFailed(text))


def _status_error(response: _Response) -> openai.APIStatusError:
    """A line's refusal as the client would have raised it, so that it is classified in the same way."""
    sent = httpx2.Request("POST", f"http://batch{CHAT_URL}")
    return openai.APIStatusError(
        "refused", response=httpx2.Response(response.status_code, request=sent), body=response.body
    )


def format_batch_errors(errors: Sequence[tuple[str | None, str | None]]) -> str:
    """The first three reasons why a provider did not begin a batch."""
    told = [f"{code or 'error'}: {message or 'no reason given'}" for code, message in errors[:3]]
    return "; ".join(told) or "no reason given"
