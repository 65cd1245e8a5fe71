"""Flips in copies of a run that every command reads, in a process of its own, so that one that dies costs one flip.

Apart from `__main__.py`, which a spawned process cannot import.
"""

from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from tests.support.disturbances.flipped_bytes import Flip, FlippedRun, Tally, Verdict


def sweep(run: FlippedRun, flips: Sequence[Flip], folder: Path) -> Tally:
    """Judge every flip; a process that dies counts for the flip that it was at."""
    tally, left = Tally(), [*flips]
    context = get_context("spawn")
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_judge, args=(run, left, folder, theirs), daemon=True)
        process.start()
        theirs.close()
        num_done = 0
        for found in _receive(ours):
            tally.add(left[num_done], found)
            num_done += 1
        process.join()
        if num_done < len(left):
            tally.add(left[num_done], {"process": ("crash", f"exit code {process.exitcode}")})
            num_done += 1
        left = left[num_done:]
    return tally


def _judge(run: FlippedRun, flips: Sequence[Flip], folder: Path, results: Connection) -> None:
    for flip in flips:
        results.send(run.judge([flip], folder))


def _receive(results: Connection) -> Iterator[dict[str, tuple[Verdict, str]]]:
    try:
        while True:
            yield results.recv()
    except EOFError:
        return
