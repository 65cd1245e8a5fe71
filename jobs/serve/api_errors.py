"""Errors of the batch server, in the form that clients of OpenAI's API read."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_TYPES = {401: "authentication_error", 404: "not_found_error", 409: "conflict_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not followed; becomes a response with OpenAI's error body."""

    def __init__(self, status_code: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.param = param
        self.code = code


async def show_error(request: Request, error: Exception) -> Response:
    """The response of an `ApiError`, or of one that nobody expected, which says nothing of the request."""
    if isinstance(error, ApiError):
        return make_error(error.status_code, str(error), param=error.param, code=error.code)
    return make_error(500, f"the server failed: {type(error).__name__}")


def make_error(status_code: int, message: str, *, param: str | None = None, code: str | None = None) -> Response:
    kind = _TYPES.get(status_code, "server_error" if status_code >= 500 else "invalid_request_error")
    headers = {"Retry-After": "5"} if status_code in (429, 503) else {}
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code, headers=headers)
