"""Runners of batches that wait for milliseconds."""

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest

from moebeam.model_runner.openai_engine.batch.runner import BatchRunner
from moebeam.model_runner.openai_engine.batch.service import BatchPolling, BatchService
from moebeam.model_runner.openai_engine.client import EndpointSpec
from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.schemas.redaction.known_secrets import learn_secret
from tests.support.engines.batch_calls import KEY, Make
from tests.support.engines.engine_configs import engine_config
from tests.support.servers.batch_endpoint import BatchEndpoint


@pytest.fixture(autouse=True)
def nothing_is_left_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OPENAI_ORG_ID", "foreign")
    yield
    gc.collect()


@pytest.fixture
def make() -> Make:
    def runner(endpoint: BatchEndpoint, provider: str = "alibaba", **values: Any) -> BatchRunner:
        spec = EndpointSpec(
            profile=find_profile(provider),
            model="deepseek-v4-flash",
            base_url=endpoint.base_url,
            max_concurrency=1,
            timeout_s=20.0,
            is_stream=False,
            max_retries=values.pop("max_retries", 2),
        )
        config = engine_config(
            engine="openai", path="", name="deepseek-v4-flash", revision="", **values.pop("config", {})
        )
        polling = BatchPolling(first_poll_s=0.001, max_poll_s=0.002, max_failed_polls=3, queue_wait_s=0.001)
        max_outage_s = values.pop("max_outage_s", 20.0)
        learn_secret(KEY)
        service = BatchService(spec, KEY, polling, values.pop("sleep", time.sleep), max_outage_s)
        return BatchRunner(config, service, **values)

    return runner
