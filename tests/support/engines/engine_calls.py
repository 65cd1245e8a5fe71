"""Requests to an engine that asks a fake endpoint, and the completions that come back."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moebeam.model_runner.openai_engine.outages.circuit import OutagePolicy
from moebeam.model_runner.openai_engine.runner import OpenAIRunner, load_openai_runner
from moebeam.schemas.chat_options import ChatOptions
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.remote_engines import FAST, brief
from tests.support.servers.fake_endpoint import (
    Call,
    FakeEndpoint,
    Reply,
    deepseek,
)

Answering = Callable[[Call], Reply]


def requests(num: int, *, shared: int = 0, **options: Any) -> list[Request]:
    """Requests that share so many of their first tokens."""
    prefix = np.zeros(shared, dtype=np.int32)
    return [
        Request(
            f"r{i}",
            np.append(prefix, np.int32(i + 1)).astype(np.int32),
            (Message("user", f"question {i}"),),
            Sampling(100),
            options=ChatOptions(**options),
        )
        for i in range(num)
    ]


def runner(served: FakeEndpoint, outages: OutagePolicy | None = None, **values: Any) -> OpenAIRunner:
    given: dict[str, Any] = {"provider": "deepseek", "base_url": served.base_url, "max_retries": 3}
    config = engine_config("openai", "", "deepseek-v4-flash", "rev", **(given | values))
    loaded = load_openai_runner(config, FAST, outages or brief())
    assert isinstance(loaded, OpenAIRunner)
    return loaded


def completions(reply: Answering, wanted: Sequence[Request], **values: Any) -> dict[str, Completion]:
    with FakeEndpoint(reply) as served:
        found = list(runner(served, **values).generate(wanted))
    assert Counter(c.request_id for c in found) == Counter(r.request_id for r in wanted)
    return {completion.request_id: completion for completion in found}


def only(reply: Answering, **values: Any) -> Completion:
    (completion,) = completions(reply, requests(1), **values).values()
    return completion


def echo(call: Call) -> Reply:
    return Reply(deepseek(call.last_user_text))


def script(*replies: Reply) -> Answering:
    """The replies in order; the last one again and again."""
    return lambda call: replies[min(call.number, len(replies) - 1)]


GOOD = Reply(deepseek("fine"))
