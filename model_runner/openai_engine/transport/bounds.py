"""How large and how slow a response may be: the formulas, and the bounds of the call that is being made.

Below `client.py` and `batch/service.py`, which set the bounds, and `bounded_client.py`, which holds responses to them.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from moebeam.schemas.records import Sampling

NUM_HIDDEN_TOKENS = 32_768
"""Tokens of reasoning that some providers do not count against `max_tokens`."""
TOKEN_BYTES = 256
"""Most bytes of a token in JSON, on average over an answer: an escaped character takes 6, a run of blanks 128."""
EVENT_BYTES = 1_024
"""Most bytes of a token's event in a stream, on average."""
LOGPROB_BYTES = 256
"""A token, its log probability and its bytes spelled as numbers."""
TOKEN_S = 0.1
"""A provider writes at least ten tokens a second, on average over an answer."""

_FILE_TOKEN_BYTES = 16
"""As `TOKEN_BYTES`, on average over all answers of a file."""
_FILE_LINE_BYTES = 4_096
_FILE_BYTES_S = 1 << 17


@dataclass(frozen=True, slots=True)
class ResponseBounds:
    """What one call may bring: bytes as they come and after they are decompressed, each, and seconds for all of it."""

    max_bytes: int
    max_s: float


def bound_answer(
    sampling: Sampling, *, is_stream: bool, timeout_s: float, max_bytes: int = 0, max_s: float = 0.0
) -> ResponseBounds:
    """The bounds of one answer.

    Args:
        timeout_s: most seconds of silence.
        max_bytes, max_s: as `[model]` sets them; 0 takes what an answer of `max_tokens` tokens can need.
    """
    num_tokens = sampling.max_tokens + NUM_HIDDEN_TOKENS
    token_bytes = (EVENT_BYTES if is_stream else TOKEN_BYTES) + _logprob_bytes(sampling)
    return ResponseBounds(max_bytes or num_tokens * token_bytes, max_s or timeout_s + num_tokens * TOKEN_S)


def bound_file_line(sampling: Sampling) -> int:
    """What one answer adds to the bytes that a batch's file of answers may have."""
    num_tokens = sampling.max_tokens + NUM_HIDDEN_TOKENS
    return _FILE_LINE_BYTES + num_tokens * (_FILE_TOKEN_BYTES + _logprob_bytes(sampling))


def bound_file(max_bytes: int, timeout_s: float) -> ResponseBounds:
    """The bounds of a file's way in or out, of so many bytes at most."""
    return ResponseBounds(max_bytes, timeout_s + max_bytes / _FILE_BYTES_S)


def _logprob_bytes(sampling: Sampling) -> int:
    return LOGPROB_BYTES * (1 + sampling.top_logprobs) if sampling.logprobs else 0


_BOUNDS: ContextVar[ResponseBounds] = ContextVar("response bounds")


@contextmanager
def bounded(bounds: ResponseBounds) -> Generator[None]:
    """Hold the calls that are made inside, by this task, to these bounds."""
    token = _BOUNDS.set(bounds)
    try:
        yield
    finally:
        _BOUNDS.reset(token)


def current_bounds() -> ResponseBounds:
    """The bounds of the call that is being made; a call without any is a mistake of ours."""
    return _BOUNDS.get()
