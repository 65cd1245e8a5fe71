"""A real S3 server for every test of this folder; the environment of the tests names it and nothing else."""

import itertools
from collections.abc import Callable, Iterator

import fsspec
import pytest

from tests.support.servers.s3_server import S3Server


@pytest.fixture(scope="session")
def running_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def s3(running_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, with its endpoint and credentials in the environment; up again after the test."""
    for name, value in running_s3.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE", "FSSPEC_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield running_s3
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        if not running_s3.is_running:
            running_s3.start()


@pytest.fixture
def bucket(s3: S3Server, new_bucket_name: Callable[[], str]) -> str:
    """The URL of a bucket of the test's own."""
    return s3.bucket(new_bucket_name())


@pytest.fixture(scope="session")
def new_bucket_name() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"bucket-{next(numbers)}"
