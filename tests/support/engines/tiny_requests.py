"""Requests to the tiny checkpoint, and what becomes of them: what tests of several engines share."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moebeam.model_runner.grammar.json_grammar import json_schema_grammar
from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.errors import ContextOverflow, EngineFailed, RowError
from moebeam.schemas.records import Completion, Message, Request, Sampling

BOS_ID, EOS_ID, FIRST_ID, END_ID = 0, 1, 5, 261
"""Special tokens, and the bounds of those that stand for bytes."""

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "priority": {"enum": ["low", "high", None]},
        "is_open": {"type": "boolean"},
    },
    "required": ["name", "priority", "is_open"],
    "additionalProperties": False,
}
GRAMMAR = json_schema_grammar(SCHEMA, max_whitespace=0)


def request_of(request_id: object, tokens: Sequence[int], max_tokens: int = 12, **values: Any) -> Request:
    """A request whose further values are those of its sampling or its own, by their names."""
    sampling = {name: values.pop(name) for name in list(values) if name in Sampling.__slots__}
    token_ids = np.array([BOS_ID, *tokens], dtype=np.int32)
    return Request(str(request_id), token_ids, (Message("user", "x"),), Sampling(max_tokens, **sampling), **values)


CANNOT_RUN: dict[str, tuple[Request, type[RowError]]] = {
    "empty": (replace(request_of("bad", []), prompt_token_ids=np.array([], dtype=np.int32)), EngineFailed),
    "outside": (request_of("bad", [END_ID]), EngineFailed),
    "negative": (request_of("bad", [-1]), EngineFailed),
    "no tokens": (request_of("bad", [70], max_tokens=0), EngineFailed),
    "too long": (request_of("bad", [70] * 500, max_tokens=12), ContextOverflow),
}
"""Requests that no engine can run with the tiny checkpoint, and the failure that each is."""


def run_all(runner: ModelRunner, requests: Sequence[Request]) -> dict[str, Completion]:
    """What becomes of each request; exactly one completion each."""
    found: dict[str, Completion] = {}
    for completion in runner.generate(requests):
        assert completion.request_id not in found
        found[completion.request_id] = completion
    assert set(found) == {request.request_id for request in requests}
    return found


def texts(found: dict[str, Completion]) -> dict[str, tuple[str, str, int]]:
    """What depends on the request alone."""
    return {name: (one.text, one.finish_reason, one.usage.completion_tokens) for name, one in found.items()}
