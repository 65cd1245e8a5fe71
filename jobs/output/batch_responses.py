"""One row's answers as a line of OpenAI's Batch API: its results, or its rejects.

Part of `moebeam export`, below `batch_export.py`. Specification: OpenAI's batch request output object, whose body is a
chat completion with a choice a sample.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from moebeam.schemas.canonical import Json, fingerprint

_LEAST_LOGPROB = -9999.0
"""OpenAI's value for a token of almost no probability; JSON has no infinity."""

_OPENAI_FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter")
_LINE_BREAKS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""JSON allows these unescaped in strings, but readers that split at Unicode line breaks would break there."""

_STATUS_CODES: Mapping[str, int] = {
    "refused": 400,
    "request_refused": 400,
    "invalid_grammar": 400,
    "engine_overloaded": 503,
    "answer_interrupted": 503,
    "engine_timeout": 504,
    "malformed_response": 502,
    "response_too_large": 502,
    "redirect_refused": 502,
}
"""Error type -> HTTP status of a response without an answer; 500 for all others."""

Row: TypeAlias = Mapping[str, Any]
AnswerTimes: TypeAlias = Mapping[str, int]
"""custom_id -> when its last attempt was answered, in seconds since the epoch."""

Samples: TypeAlias = Sequence[Row]
"""Rows of one table that are samples of one row of the input, at least one."""


def format_line(value: Json) -> str:
    """Format a JSON value as one line, for every definition of a line end."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_LINE_BREAKS) + "\n"


def answer_line(samples: Samples, times: AnswerTimes) -> dict[str, Json]:
    """Build the line of a row's results: a choice each."""
    digest = _digest(samples[0])
    return _line(samples[0], digest, _response(digest, 200, _chat_completion(samples, samples, digest, times)), None)


def error_line(samples: Samples, times: AnswerTimes) -> dict[str, Json]:
    """Build the line of a row's rejects; its valid answers, if any, are a line of the other file with the same id.

    A row that was never sent has no response. A row whose answers were not accepted has those answers with status 200,
    because they arrived and were billed. A row without an answer has the status of its failure.
    """
    first, digest = samples[0], _digest(samples[0])
    error: dict[str, Json] = {"code": first["error_type"], "message": _message(samples)}
    if not any(row["attempts"] or row["merged_into"] is not None for row in samples):
        return _line(first, digest, None, error)
    answered = [
        row for row in samples if row["error_stage"] == "validate" and row["finish_reason"] in _OPENAI_FINISH_REASONS
    ]
    if answered:
        completion = _chat_completion(answered, samples, digest, times)
        return _line(first, digest, _response(digest, 200, completion), error)
    body: dict[str, Json] = {"error": {**error, "type": first["error_stage"], "param": None}, "usage": _usage(samples)}
    return _line(first, digest, _response(digest, _STATUS_CODES.get(first["error_type"], 500), body), error)


def _message(samples: Samples) -> str:
    first = samples[0]
    if first["scope"] != "row":
        stands_for = "an unknown number of" if first["num_rows"] is None else first["num_rows"]
        return f"{first['error_message']} (this line stands for {stands_for} rows)"
    if len(samples) == 1 and not _number(first):
        return first["error_message"]
    return "; ".join(f"sample {_number(row)}: {row['error_message']}" for row in samples)


def _number(row: Row) -> int:
    """Which of its row's samples it is; tables of older versions have one a row."""
    return row.get("sample") or 0


def _line(row: Row, digest: str, response: Json, error: Json) -> dict[str, Json]:
    return {"id": f"batch_req_{digest}", "custom_id": row["custom_id"], "response": response, "error": error}


def _response(digest: str, status_code: int, body: Json) -> Json:
    return {"status_code": status_code, "request_id": f"req_{digest}", "body": body}


def _digest(row: Row) -> str:
    """Derive a row's id from its place in the input, because rejected duplicates share a custom_id."""
    return fingerprint([row["run_id"], row["source_file"], row["source_row"], row["scope"]])[:32]


def _chat_completion(chosen: Samples, samples: Samples, digest: str, times: AnswerTimes) -> Json:
    """A row's chat completion.

    Args:
        chosen: those that are its choices.
        samples: those whose usage it tells.
    """
    row = chosen[0]
    return {
        "id": f"chatcmpl-{digest}",
        "object": "chat.completion",
        # A row reused from an earlier run was not answered in this one.
        "created": times.get(row["merged_into"] or row["custom_id"], 0),
        "model": row["model"] or "",
        "choices": [_choice(each) for each in chosen],
        "usage": _usage(samples),
        "system_fingerprint": row["model_revision"] or None,
    }


def _choice(row: Row) -> Json:
    text: str | None = row["output_text"]
    calls: list[Json] = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]},
        }
        for call in row["tool_calls"] or ()
    ]
    message: dict[str, Json] = {
        "role": "assistant",
        "content": None if calls and not text else text,
        "refusal": None,
    }
    if row["reasoning_content"] is not None:
        message["reasoning_content"] = row["reasoning_content"]
    if calls:
        message["tool_calls"] = calls
    return {
        "index": _number(row),
        "message": message,
        "logprobs": _logprobs(row["logprobs"], row.get("top_logprobs")),
        "finish_reason": row["finish_reason"],
    }


def _logprobs(logprobs: Sequence[float] | None, likeliest: Sequence[Sequence[Row]] | None) -> Json:
    """Log probabilities; a run keeps the texts of the likeliest tokens, not those of the drawn ones."""
    if logprobs is None:
        return None
    return {
        "content": [
            {
                "token": "",
                "bytes": None,
                "logprob": _finite(logprob),
                "top_logprobs": [
                    {"token": likely["token"], "bytes": None, "logprob": _finite(likely["logprob"])} for likely in place
                ],
            }
            for logprob, place in zip(logprobs, likeliest or [()] * len(logprobs), strict=True)
        ],
        "refusal": None,
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def _usage(samples: Samples) -> Json:
    """Usage of all attempts at a row's samples; unknown tokens are null, not zero."""
    prompt, completion, cached, reasoning = (
        _sum([row[name] for row in samples])
        for name in ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
    )
    if prompt is None or completion is None:
        return None
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
