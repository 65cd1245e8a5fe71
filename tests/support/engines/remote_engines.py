"""The `openai` engine as tests load it: short waits, no key, a folder of its own for what processes share."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.openai_engine import concurrency
from moebeam.model_runner.openai_engine.endpoint import RetryPolicy
from moebeam.model_runner.openai_engine.outages.circuit import OutagePolicy
from moebeam.model_runner.openai_engine.runner import OpenAIRunner, load_openai_runner
from moebeam.schemas.job.sections import FailuresSection
from moebeam.schemas.records import Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config

FAST = RetryPolicy(first_wait_s=0.001, max_wait_s=0.002, max_overload_wait_s=0.002)


def brief(max_outage_s: float = 20.0, **values: Any) -> OutagePolicy:
    """Outages that are noticed and probed within milliseconds; waited for longer than any test means to."""
    given: dict[str, Any] = {"overload_s": 0.05, "first_wait_s": 0.005, "max_wait_s": 0.02}
    return OutagePolicy(max_outage_s, **(given | values))


def load_engine(
    base_url: str, outages: OutagePolicy | None = None, *, max_same_refusals: int = 20, **values: Any
) -> OpenAIRunner:
    """An engine of one endpoint of a private server; `values` are options of `[model]`."""
    given: dict[str, Any] = {"provider": "vllm", "base_url": base_url, "max_retries": 2, "timeout_s": 5.0}
    config = engine_config("openai", "", "m", "rev", **(given | values))
    config = replace(config, failures=FailuresSection(max_same_refusals=max_same_refusals))
    loaded = load_openai_runner(config, FAST, outages or brief())
    assert isinstance(loaded, OpenAIRunner)
    return loaded


def ask_rows(num: int, *, first: int = 0, max_tokens: int = 100) -> list[Request]:
    """Requests that share no prefix, named by their number, which is also what they ask."""
    return [
        Request(str(n), np.array([n + 1], dtype=np.int32), (Message("user", f"question {n}"),), Sampling(max_tokens))
        for n in range(first, first + num)
    ]


def keep_limits_apart(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep this test's processes out of the limits that those of a machine share."""
    monkeypatch.setattr(concurrency, "host_folder", lambda: folder)
