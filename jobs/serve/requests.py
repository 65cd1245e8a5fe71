"""The bodies that clients send to the batch server, checked field by field."""

import re
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.requests import Request

from moebeam.jobs.serve.api_errors import ApiError
from moebeam.jobs.serve.records import CHAT_ENDPOINT

MAX_BODY_BYTES = 64 << 10
_WINDOW = re.compile(r"([1-9][0-9]{0,3})(m|h|d)")
_WINDOW_S = {"m": 60, "h": 3600, "d": 86_400}
_MAX_WINDOW_S = 30 * 86_400

_Body = TypeVar("_Body", bound=BaseModel)


class ExpiresAfter(BaseModel):
    """When a file goes: seconds after it was made, an hour to 30 days."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class CreateBatch(BaseModel):
    """The body of `POST /v1/batches`."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: Annotated[str, Field(max_length=128)]
    endpoint: Literal["/v1/chat/completions"] = CHAT_ENDPOINT
    completion_window: str = "24h"
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None

    @field_validator("completion_window")
    @classmethod
    def _check_window(cls, value: str) -> str:
        if not _WINDOW.fullmatch(value) or count_window_s(value) > _MAX_WINDOW_S:
            raise ValueError("expected a number of minutes, hours or days up to 30 days, such as 24h or 90m")
        return value


def count_window_s(window: str) -> int:
    """The seconds of a completion window such as `24h`."""
    found = _WINDOW.fullmatch(window)
    assert found is not None, "checked by CreateBatch"
    return int(found[1]) * _WINDOW_S[found[2]]


async def read_body(request: Request, body_type: type[_Body]) -> _Body:
    """Read a JSON body of at most `MAX_BODY_BYTES`.

    Raises:
        ApiError: it is larger, no JSON, or a field is not as expected.
    """
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise ApiError(413, f"expected a body of at most {MAX_BODY_BYTES:,} bytes, found more")
    try:
        return body_type.model_validate_json(content)
    except ValidationError as error:
        raise explain(error) from error


def explain(error: ValidationError) -> ApiError:
    """The response to a body that is wrong; names the first field that is."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    found: object = first["input"]
    shown = f", found {found!r}" if isinstance(found, (str, int, float)) and len(str(found)) < 100 else ""
    return ApiError(400, f"{place or 'body'}: {first['msg']}{shown}", param=place or None)
