"""Leases on a real S3 server: the same protocol by conditional writes."""

import dataclasses
import json
import threading

import pytest

from schemas import storage
from schemas.layout import RunLayout
from transforms.lease import Lease, ShardLease, host_identity, read_leases

pytestmark = pytest.mark.integration


def written(layout: RunLayout, lease: Lease) -> None:
    storage.write_note(layout.lease("s0", 0), json.dumps(dataclasses.asdict(lease)).encode())


def test_of_racing_copies_one_takes_over_from_a_dead_one_on_s3(bucket: str) -> None:
    layout = RunLayout(f"{bucket}/out")
    written(layout, Lease("other", "elsewhere", 1, 0.0, 0, 0.0))
    claims: list[bool] = []
    barrier, done = threading.Barrier(6), threading.Barrier(6)

    def race() -> None:
        barrier.wait()
        with ShardLease(layout, "s0").claimed() as is_ours:
            claims.append(is_ours)
            done.wait()

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claims) == [False] * 5 + [True]


def test_a_living_holder_elsewhere_is_waited_for_on_s3(bucket: str) -> None:
    layout = RunLayout(f"{bucket}/out")
    written(layout, Lease("other", "elsewhere", 1, 0.0, 0, 4e9))
    with ShardLease(layout, "s0").claimed() as is_ours:
        assert not is_ours
    assert read_leases(layout)["s0"].host == "elsewhere" != host_identity()
