"""What the batch server keeps of a file and of a batch, and how OpenAI's interface shows them.

Specification: the File and Batch objects of OpenAI's API. Times are whole seconds since the epoch.
"""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from moebeam.schemas.canonical import Json

BatchStatus: TypeAlias = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED: frozenset[BatchStatus] = frozenset({"failed", "completed", "expired", "cancelled"})

CHAT_ENDPOINT = "/v1/chat/completions"
MAX_SHOWN_ERRORS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of a tenant: a batch's input, or what a batch made.

    Attributes:
        num_lines: those that are not blank.
        sha256: of its bytes, in hex.
        expires_at: it is removed then; None keeps it.
        request_key: what a repeated upload is known by; empty for what a batch made.
    """

    file_id: str
    tenant: str
    filename: str
    purpose: str
    num_bytes: int
    num_lines: int
    sha256: str
    created_at: int
    expires_at: int | None = None
    request_key: str = ""

    def to_json(self) -> dict[str, Json]:
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchError:
    """Why a batch failed; `line` of its input, from 1, or None."""

    code: str
    message: str
    line: int | None = None

    def to_json(self) -> dict[str, Json]:
        return {"code": self.code, "message": self.message, "line": self.line, "param": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a batch's answers, as its run counted them."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int

    def to_json(self) -> dict[str, Json]:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch of a tenant.

    Attributes:
        metadata: the client's own pairs.
        output_expires_after_s: of the files that it makes; None keeps them.
        num_lines, num_completed, num_failed: OpenAI's request counts.
        times: when it entered a status, by the name of OpenAI's field, such as `in_progress_at`.
        num_failures: how often its run has failed, or ended without a word.
        request_key: what a repeated request is known by.
    """

    batch_id: str
    tenant: str
    input_file_id: str
    endpoint: str
    completion_window: str
    created_at: int
    expires_at: int
    status: BatchStatus = "validating"
    metadata: tuple[tuple[str, str], ...] = ()
    output_expires_after_s: int | None = None
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    usage: Usage | None = None
    model: str | None = None
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    times: tuple[tuple[str, int], ...] = ()
    num_failures: int = 0
    request_key: str = ""

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def enter(self, status: BatchStatus) -> "Batch":
        """The same batch, in another status from now on; the time of the first entry stays."""
        times = {f"{status}_at": int(time.time()), **dict(self.times)}
        return replace(self, status=status, times=tuple(times.items()))

    def fail(self, *errors: BatchError) -> "Batch":
        return replace(self.enter("failed"), errors=errors[:MAX_SHOWN_ERRORS])

    def to_json(self) -> dict[str, Json]:
        entered: Mapping[str, int] = dict(self.times)
        names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        errors: Json = None
        if self.errors:
            errors = {"object": "list", "data": [error.to_json() for error in self.errors]}
        return {
            "id": self.batch_id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{name}_at": entered.get(f"{name}_at") for name in names},
            "request_counts": {"total": self.num_lines, "completed": self.num_completed, "failed": self.num_failed},
            "usage": None if self.usage is None else self.usage.to_json(),
            "metadata": dict(self.metadata) or None,
        }


def make_id(kind: Literal["file", "batch"]) -> str:
    """A new id; of two made at different times the later one sorts behind."""
    separator = "-" if kind == "file" else "_"
    return f"{kind}{separator}{time.time_ns() // 1_000:014x}{secrets.token_hex(8)}"
