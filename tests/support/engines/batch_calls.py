"""Requests of batch mode, and what an endpoint for batches answers to them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moebeam.model_runner.openai_engine.batch.runner import BatchRunner
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.servers.batch_endpoint import BatchEndpoint
from tests.support.servers.fake_endpoint import deepseek

KEY = "sk-test-0123456789"


def answered(text: str = "fine", **values: Any) -> Mapping[str, Any]:
    return {"response": {"status_code": 200, "request_id": "r", "body": deepseek(text, **values)}, "error": None}


def refused(status: int, code: str | None = None, message: str = "no") -> Mapping[str, Any]:
    body = {"error": {"message": message, "code": code, "type": "error", "param": None}}
    return {"response": {"status_code": status, "request_id": "r", "body": body}, "error": None}


def ended(code: str) -> Mapping[str, Any]:
    return {"response": None, "error": {"code": code, "message": "not run"}}


def text_of(body: Mapping[str, Any]) -> str:
    return body["messages"][-1]["content"]


def echo(body: Mapping[str, Any]) -> Mapping[str, Any]:
    return answered(f"echo {text_of(body)}")


def by_text(outcomes: Mapping[str, Mapping[str, Any] | None]) -> Callable[[Mapping[str, Any]], Any]:
    return lambda body: outcomes[text_of(body)] if text_of(body) in outcomes else echo(body)


def requests(num: int, *, first: int = 0, **values: Any) -> list[Request]:
    sampling = values.pop("sampling", Sampling(max_tokens=16))
    prompt = np.array([1, 2, 3], np.int32)
    return [
        Request(f"row-{n}", prompt, (Message("user", f"text {n}"),), sampling, **values)
        for n in range(first, first + num)
    ]


Make = Callable[..., BatchRunner]


def ids(completions: Sequence[Completion]) -> Counter[str]:
    return Counter(completion.request_id for completion in completions)


def once(wanted: Sequence[Request]) -> Counter[str]:
    return Counter(request.request_id for request in wanted)


def asked_once(endpoint: BatchEndpoint, wanted: Sequence[Request]) -> bool:
    return Counter(map(text_of, endpoint.asked)) == Counter(request.messages[-1].content for request in wanted)
