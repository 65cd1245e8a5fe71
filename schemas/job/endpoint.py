"""Addresses of endpoints and names of variables that hold keys, checked as job files bring them.

A job file names keys, it never holds one. What looks like a key in the place of a name is refused without being shown,
because messages end up in logs.
"""

import re
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator

_API_VERSION = re.compile(r"api-version=[A-Za-z0-9._-]{1,40}")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")


def _check_address(value: str) -> str:
    try:
        parts = urlsplit(value)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        parts, has_port = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not parts.hostname or not has_port:
        raise ValueError("expected an address such as https://host/v1")
    has_query = parts.query and not _API_VERSION.fullmatch(parts.query)
    if "@" in parts.netloc or has_query or parts.fragment:
        raise ValueError(
            "expected an address without user, query or fragment (Azure's api-version may be one); keys come from the "
            "environment"
        )
    return value.rstrip("/")


def _check_variable(value: str) -> str:
    if not _VARIABLE.fullmatch(value):
        raise ValueError(
            "expected the NAME of an environment variable, in capitals such as DEEPSEEK_API_KEY, found something else; "
            "if it is a key, take it out of the file and replace it at the provider"
        )
    return value


Address: TypeAlias = Annotated[str, AfterValidator(_check_address)]
"""`http` or `https` up to where `/chat/completions` follows, without credentials; Azure's may have an `api-version`."""

KeyVariable: TypeAlias = Annotated[str, AfterValidator(_check_variable)]
"""Name of the environment variable that holds a key."""
