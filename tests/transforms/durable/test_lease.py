"""Leases: one holder at a time while it lives, a successor as soon as it is known to be dead."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable import lease as lease_module
from moebeam.transforms.durable.lease import ShardLease, host_identity, read_leases
from tests.support.disturbances.racing_leases import race_for_shard, write_lease


@pytest.fixture
def layout(tmp_path: Path) -> RunLayout:
    return RunLayout(str(tmp_path))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


FAR = 4e9
"""An expiry that no test lives to see."""


def test_a_free_shard_is_claimed_and_its_lease_is_removed_once_it_is_committed(layout: RunLayout) -> None:
    with ShardLease(layout, "s0").hold() as is_ours:
        assert is_ours
        held = read_leases(layout)["s0"]
        assert (held.pid, held.host) == (os.getpid(), host_identity())
    assert read_leases(layout)["s0"].expires_at == 0.0, "released: a holder before it must learn that it was succeeded"
    with ShardLease(layout, "s0").hold():
        storage.write_whole(layout.shard_commit("s0"), b"{}")
    assert [name for name in storage.list_names(layout.leases) if name.startswith("s0.1")] == []


@pytest.mark.parametrize("sign", ["a successor", "a commit", "no lease"])
def test_a_holder_learns_before_its_next_request_that_it_lost_its_shard(
    layout: RunLayout, sign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "CERTAIN_S", -1.0)
    with ShardLease(layout, "s0").hold() as held:
        assert held is not None
        assert asyncio.run(held.confirm()) and not held.is_lost
        if sign == "a successor":
            write_lease(layout, 1)
        elif sign == "a commit":
            storage.write_whole(layout.shard_commit("s0"), b"{}")
        else:
            storage.remove_files([layout.lease("s0", 0)])
        left = {name: storage.read_bytes(f"{layout.leases}/{name}") for name in storage.list_names(layout.leases)}
        assert not asyncio.run(held.confirm()) and held.is_lost
    assert left == {name: storage.read_bytes(f"{layout.leases}/{name}") for name in storage.list_names(layout.leases)}


def test_a_holder_that_renewed_lately_asks_only_the_clock(layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str) -> bytes:
        raise OSError(5, "the store does not answer", path)

    with ShardLease(layout, "s0").hold() as held:
        assert held is not None
        monkeypatch.setattr(storage, "read_bytes", broken)
        assert asyncio.run(held.confirm())
        monkeypatch.setattr(lease_module, "CERTAIN_S", -1.0)
        assert asyncio.run(held.confirm()), "nobody takes over before the lease ends"
        monkeypatch.setattr(lease_module, "LEASE_S", -1.0)
        with pytest.raises(OSError, match="does not answer"):
            asyncio.run(held.confirm())


def test_while_one_copy_holds_a_shard_another_gets_nothing(layout: RunLayout) -> None:
    with ShardLease(layout, "s0").hold():
        with ShardLease(layout, "s0").hold() as is_ours:
            assert not is_ours
        with ShardLease(layout, "s1").hold() as is_ours:
            assert is_ours


def test_of_racing_copies_exactly_one_claims(layout: RunLayout) -> None:
    write_lease(layout, 0)
    assert sorted(race_for_shard(layout, 8)) == [False] * 7 + [True]


def test_an_error_gives_the_shard_back_at_once(layout: RunLayout) -> None:
    with pytest.raises(ValueError, match="broke"), ShardLease(layout, "s0").hold():
        raise ValueError("broke")
    with ShardLease(layout, "s0").hold() as is_ours:
        assert is_ours


def test_a_lease_whose_end_could_not_be_written_does_not_block_its_own_process(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, content: bytes) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(storage, "write_note", full)
    with pytest.raises(ValueError, match="broke"), ShardLease(layout, "s0").hold():
        raise ValueError("broke")
    with ShardLease(layout, "s0").hold() as is_ours:
        assert is_ours


def test_a_dead_process_of_this_host_is_succeeded_before_its_lease_ends(layout: RunLayout) -> None:
    write_lease(layout, 0, host=host_identity(), pid=dead_process(), expires_at=FAR)
    with ShardLease(layout, "s0").hold() as is_ours:
        assert is_ours
        assert read_leases(layout)["s0"].pid == os.getpid()


def test_a_process_that_got_the_number_of_a_dead_one_does_not_count_as_it(layout: RunLayout) -> None:
    write_lease(layout, 0, host=host_identity(), pid=os.getppid(), process_started=5.0, expires_at=FAR)
    with ShardLease(layout, "s0").hold() as is_ours:
        assert is_ours


def test_a_living_process_of_this_host_is_waited_for(layout: RunLayout) -> None:
    started = lease_module.process_started(os.getppid())
    write_lease(layout, 0, host=host_identity(), pid=os.getppid(), process_started=started, expires_at=FAR)
    with ShardLease(layout, "s0").hold() as is_ours:
        assert not is_ours


def test_a_holder_elsewhere_counts_until_its_lease_ends(layout: RunLayout) -> None:
    write_lease(layout, 0, expires_at=FAR)
    with ShardLease(layout, "s0").hold() as is_ours:
        assert not is_ours
    write_lease(layout, 0, expires_at=1.0)
    with ShardLease(layout, "s0").hold() as is_ours:
        assert is_ours


def test_a_holder_that_falls_silent_is_succeeded_whatever_its_clock_says(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: clock[0])
    write_lease(layout, 0, expires_at=FAR)
    waiting = ShardLease(layout, "s0")
    for num_renewals in range(4):
        write_lease(layout, 0, expires_at=FAR, num_renewals=num_renewals)
        clock[0] += lease_module.LEASE_S / 2
        with waiting.hold() as is_ours:
            assert not is_ours
    clock[0] += lease_module.LEASE_S + 1
    with waiting.hold() as is_ours:
        assert is_ours


def test_the_last_lease_of_a_chain_counts(layout: RunLayout) -> None:
    write_lease(layout, 0)
    write_lease(layout, 1)
    write_lease(layout, 2, expires_at=FAR)
    with ShardLease(layout, "s0").hold() as is_ours:
        assert not is_ours
    assert read_leases(layout)["s0"].expires_at == FAR


def test_a_holder_renews_while_it_works(layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEWAL_S", 0.01)
    renewed = threading.Event()
    real = storage.write_note

    def note(path: str, content: bytes) -> None:
        real(path, content)
        renewed.set()

    monkeypatch.setattr(storage, "write_note", note)
    with ShardLease(layout, "s0").hold():
        first = read_leases(layout)["s0"]
        assert renewed.wait(30)
        later = read_leases(layout)["s0"]
    assert later.attempt == first.attempt
    assert later.num_renewals > 0
    assert later.expires_at > first.expires_at


def test_a_lease_that_cannot_be_read_is_waited_for_until_it_is_silent(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: clock[0])
    storage.write_note(layout.lease("s0", 0), b"{")
    waiting = ShardLease(layout, "s0")
    with waiting.hold() as is_ours:
        assert not is_ours
    clock[0] += lease_module.LEASE_S + 1
    with waiting.hold() as is_ours:
        assert is_ours
