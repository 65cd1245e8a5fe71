"""JSON records that check themselves: the last key of the object is the SHA-256 of all bytes before that key.

They stay plain JSON for every reader. Records of older versions have no such key and are read as they are.
"""

import hashlib
import re

_BEGIN, _END = b',\n  "sha256": "', b'"\n}\n'
_NUM_DIGITS = 64
_NUM_ALIKE = 10
"""A tail that agrees with a seal in so many of its fixed bytes is one, if perhaps a damaged one."""

_CLOSING = re.compile(rb"\s*}\s*\Z")


def seal_json(content: bytes) -> bytes:
    """A JSON object, which must have a key, with its digest as one key more.

    Raises:
        ValueError: the content does not end as an object does.
    """
    closing = _CLOSING.search(content)
    if closing is None:
        raise ValueError("expected a JSON object")
    body = content[: closing.start()]
    return b"".join((body, _BEGIN, hashlib.sha256(body).hexdigest().encode(), _END))


def unseal_json(content: bytes) -> bytes:
    """A sealed JSON object without its seal, or one that has none as it is.

    Raises:
        ValueError: it is sealed and not what was written.
    """
    start = len(content) - len(_BEGIN) - _NUM_DIGITS - len(_END)
    if start < 0:
        return content
    begin, end = content[start : start + len(_BEGIN)], content[-len(_END) :]
    num_alike = sum(one == other for one, other in zip(begin + end, _BEGIN + _END, strict=True))
    if num_alike < _NUM_ALIKE:
        return content
    body, digest = content[:start], content[start + len(_BEGIN) : -len(_END)]
    if begin != _BEGIN or end != _END or hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError("its content does not have the SHA-256 that it names at its end")
    return body + b"}"
