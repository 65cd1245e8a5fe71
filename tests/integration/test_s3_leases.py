"""Leases on a real S3 server: the same protocol by conditional writes."""

import pytest

from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.lease import ShardLease, host_identity, read_leases
from tests.support.disturbances.racing_leases import race_for_shard, write_lease

pytestmark = pytest.mark.integration


def test_of_racing_copies_one_takes_over_from_a_dead_one_on_s3(bucket: str) -> None:
    layout = RunLayout(f"{bucket}/out")
    write_lease(layout, 0)
    assert sorted(race_for_shard(layout, 6)) == [False] * 5 + [True]


def test_a_living_holder_elsewhere_is_waited_for_on_s3(bucket: str) -> None:
    layout = RunLayout(f"{bucket}/out")
    write_lease(layout, 0, expires_at=4e9)
    with ShardLease(layout, "s0").hold() as is_ours:
        assert not is_ours
    assert read_leases(layout)["s0"].host == "elsewhere" != host_identity()
