"""The figures of `benchmarks.flink` as a picture, where matplotlib is installed: how seconds grow with rows."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(runs: Sequence[Mapping[str, Any]], titles: Mapping[str, str], path: Path) -> None:
    """Draw seconds over rows, both logarithmic: a level line is the fixed cost, a diagonal the cost of rows.

    Args:
        runs: as `benchmarks.flink` prints them with `--json`.
        titles: what each contender is called.
    """
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(6.4, 4.4))
    for contender, title in titles.items():
        points = sorted((run["num_rows"], run["seconds"]) for run in runs if run["contender"] == contender)
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", label=title)
    staged = [(run["num_rows"], run["stages"]) for run in runs if run["stages"] is not None]
    for name, title in (("planned_s", "moebeam: planned"), ("first_answer_s", "moebeam: first shard committed")):
        points = sorted((num_rows, stages[name]) for num_rows, stages in staged)
        if points:
            axes.loglog(*zip(*points, strict=True), marker=".", linestyle=":", label=title)
    axes.set(xlabel="rows", ylabel="seconds from the command on")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
