"""Hostile content in numbers: `python -m benchmarks.hostile [--kind KIND ...] [--sample N --seed S] [--json OUT]`.

Responses, templates, schemas, files and checkpoints that would kill, freeze or falsify a run are met by a small job
each, in a process of its own. Each has to end in a typed reject, or in a refusal before the run, within 10 s and 1 GiB
of memory above an ordinary job's, and the other rows have to be answered. Exits with 1 if one did not.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, cast

from benchmarks.hostile_content.case import HostileCase, ordinary_case
from benchmarks.hostile_content.play import HANG_S, Ending, Played, play, read_names
from benchmarks.report import machine_facts, machine_line

KINDS = ("responses", "templates", "schemas", "files", "checkpoints")
MAX_EXTRA_S = 10.0
MAX_EXTRA_BYTES = 1 << 30
NUM_ORDINARY = 3

_FINE: frozenset[Ending] = frozenset({"rejected", "refused"})


@dataclass(frozen=True, slots=True)
class Judged:
    """A case, what its job did, and what is wrong with that.

    Attributes:
        extra_s: seconds above the ordinary job.
        extra_bytes: peak memory above the ordinary job's.
        faults: empty where all is well.
    """

    kind: str
    name: str
    played: Played
    extra_s: float
    extra_bytes: int
    faults: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """All values."""
        own = {"extra_s": round(self.extra_s, 2), "extra_bytes": self.extra_bytes, "faults": list(self.faults)}
        return {"kind": self.kind, "name": self.name, **own, **self.played.as_json()}


def load_cases(kind: str) -> tuple[HostileCase, ...]:
    """The cases of a kind.

    Raises:
        ValueError: two of them have one name.
    """
    cases = cast("tuple[HostileCase, ...]", import_module(f"benchmarks.hostile_content.{kind}").CASES)
    read_names(cases)
    return cases


def judge(kind: str, case: HostileCase, played: Played, ordinary: Played) -> Judged:
    """Hold a case's job against what it must keep."""
    extra_s, extra_bytes = played.wall_s - ordinary.wall_s, played.peak_bytes - ordinary.peak_bytes
    faults: list[str] = []
    if played.ending not in _FINE and not (played.ending == "answered" and case.is_harmless):
        faults.append(played.ending)
    if played.ending != "hang" and extra_s > MAX_EXTRA_S:
        faults.append("slow")
    if extra_bytes > MAX_EXTRA_BYTES:
        faults.append("large")
    if played.lost:
        faults.append("lost")
    return Judged(kind, case.name, played, extra_s, extra_bytes, tuple(faults))


def play_kind(
    kind: str, cases: Sequence[HostileCase], folder: Path, *, num_ordinary: int = NUM_ORDINARY
) -> Iterator[Judged]:
    """Play cases of one kind, after its ordinary job, of which the middle one by time counts."""
    usual = cast(
        "HostileCase", getattr(import_module(f"benchmarks.hostile_content.{kind}"), "ORDINARY", ordinary_case())
    )
    plays = sorted(
        (_play_afresh(usual, folder, 10 * HANG_S) for _ in range(num_ordinary)), key=lambda played: played.wall_s
    )
    ordinary = plays[len(plays) // 2]
    if ordinary.ending != "answered":
        raise SystemExit(f"{kind}: expected that an ordinary job is answered, found {ordinary}")
    # On a machine at work an ordinary job may take a minute, too.
    hang_s = max(HANG_S, 5 * ordinary.wall_s)
    for case in cases:
        judged = judge(kind, case, _play_afresh(case, folder, hang_s), ordinary)
        if judged.faults == ("slow",):
            # Other programs may have taken the machine meanwhile.
            judged = judge(kind, case, _play_afresh(case, folder, hang_s), ordinary)
        yield judged


def _play_afresh(case: HostileCase, folder: Path, hang_s: float) -> Played:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        return play(case, Path(made), hang_s=hang_s)


def format_table(judged: Sequence[Judged]) -> str:
    """A line a kind."""
    titles = ("rejected", "refused", "answered", "stopped", "crash", "hang", "> 10 s", "> 1 GiB", "rows lost")
    lines = [
        f"| kind | cases | {' | '.join(titles)} | median s | most s | most MiB |",
        "|---|" + "---:|" * (len(titles) + 4),
    ]
    for kind in KINDS:
        found = [one for one in judged if one.kind == kind]
        if not found:
            continue
        endings = Counter[str](one.played.ending for one in found)
        faults = Counter(fault for one in found for fault in one.faults)
        counts = [*(endings[title] for title in titles[:6]), faults["slow"], faults["large"], faults["lost"]]
        extra_s = [max(0.0, one.extra_s) for one in found]
        most_mib = max(0, *(one.extra_bytes for one in found)) >> 20
        cells = [kind, len(found), *counts, f"{median(extra_s):.1f}", f"{max(extra_s):.1f}", most_mib]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, play the cases, print one table; 1 if a case did what it must not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", action="append", choices=KINDS, help="of content; default all, may be repeated")
    parser.add_argument("--case", help="cases whose name holds this text")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="cases of each kind; 0 is all")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the sample")
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for every case's figures")
    args = parser.parse_args(argv)
    judged: list[Judged] = []
    with tempfile.TemporaryDirectory(prefix="moebeam-hostile-") as made:
        for kind in args.kind or KINDS:
            cases = [case for case in load_cases(kind) if not args.case or args.case in case.name]
            if args.sample and args.sample < len(cases):
                cases = random.Random(f"{args.seed} {kind}").sample(cases, args.sample)
            for one in play_kind(kind, cases, Path(made)) if cases else ():
                judged.append(one)
                print(_tell(one), file=sys.stderr, flush=True)
                if args.json is not None:
                    args.json.write_text(json.dumps(_as_json(judged), indent=2))
    print(format_table(judged))
    print(machine_line(machine_facts()))
    return 1 if any(one.faults for one in judged) else 0


def _as_json(judged: Sequence[Judged]) -> Mapping[str, Any]:
    return {"machine": machine_facts(), "cases": [one.as_json() for one in judged]}


def _tell(one: Judged) -> str:
    verdict = f"FAULT {', '.join(one.faults)}" if one.faults else "fine"
    how = f"{one.played.ending} {', '.join(one.played.error_types)}".rstrip()
    return (
        f"{verdict:<14} {one.kind}: {one.name}: {how}, {one.extra_s:+.1f} s, {one.extra_bytes / (1 << 20):+.0f} MiB: "
        f"{one.played.words[:160]}"
    )


if __name__ == "__main__":
    sys.exit(main())
