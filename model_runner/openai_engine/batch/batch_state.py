"""A provider's batch as it describes it: read and checked, between `service.py`, which asks, and `runner.py`.

Times that cannot be are unknown: what was answered is not given up for them.
"""

from datetime import UTC, datetime
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from moebeam.schemas.errors import MalformedResponse, abbreviate

_LAST_S = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


def _read_instant(found: object) -> float | None:
    if isinstance(found, int | float) and not isinstance(found, bool) and 0 <= found <= _LAST_S:
        return float(found)
    return None


Name = Annotated[str, Field(min_length=1, max_length=1_024)]
Instant = Annotated[float | None, BeforeValidator(_read_instant)]
"""Seconds since the epoch."""
Model = TypeVar("Model", bound=BaseModel)


class BatchError(BaseModel):
    """Why a provider did not begin a batch."""

    code: str | None = None
    message: str | None = None


class _Errors(BaseModel):
    data: list[BatchError] | None = None


class BatchState(BaseModel):
    """A batch, as of the last look."""

    id: Name
    status: Name
    created_at: Instant = None
    completed_at: Instant = None
    expired_at: Instant = None
    cancelled_at: Instant = None
    input_file_id: Name | None = None
    output_file_id: Name | None = None
    error_file_id: Name | None = None
    metadata: dict[str, str] | None = None
    errors: _Errors | None = None

    @property
    def ended_at(self) -> float | None:
        """When it ended, in whichever way."""
        return self.completed_at or self.expired_at or self.cancelled_at


class BatchPage(BaseModel):
    """A page of the list of batches, the newest first."""

    data: list[BatchState]
    has_more: bool = False


class UploadedFile(BaseModel):
    """A file that the provider keeps."""

    id: Name


def read_reply(model: type[Model], content: bytes) -> Model:
    """A response of Files or Batches.

    Raises:
        MalformedResponse: it is not what it should be.
    """
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "response"
        found = abbreviate(content[:100].decode(errors="replace"), 100)
        raise MalformedResponse(f"{where}: {first['msg']}, found {found}") from None
