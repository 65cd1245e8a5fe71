"""Leases that others left, and copies that race for a shard: on any store."""

import dataclasses
import json
import threading

from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.lease import Lease, ShardLease


def write_lease(layout: RunLayout, generation: int, **changes: object) -> Lease:
    """A lease of `s0` that some other process left; by default of a process elsewhere that is long dead."""
    lease = Lease("other", "elsewhere", 1, 0.0, 0, 0.0)
    lease = dataclasses.replace(lease, **changes)  # pyright: ignore[reportArgumentType]
    storage.write_note(layout.lease("s0", generation), json.dumps(dataclasses.asdict(lease)).encode())
    return lease


def race_for_shard(layout: RunLayout, num_copies: int) -> list[bool]:
    """Whether each of so many copies gets `s0`, all at once; whoever does holds it until all have tried."""
    claims: list[bool] = []
    barrier, done = threading.Barrier(num_copies), threading.Barrier(num_copies)

    def race() -> None:
        barrier.wait()
        with ShardLease(layout, "s0").hold() as held:
            claims.append(held is not None)
            done.wait()

    threads = [threading.Thread(target=race) for _ in range(num_copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return claims
