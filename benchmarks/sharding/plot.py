"""The figures of `benchmarks.sharding` as a picture, where matplotlib is installed: computed prefill by workers."""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SUFFIXES = (".png", ".svg")


def can_plot(path: Path) -> bool:
    """Whether a picture of this name can be drawn here."""
    return path.suffix in SUFFIXES and importlib.util.find_spec("matplotlib") is not None


def plot(workloads: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a row of panels for computed prefill over the tree, and one below for the busiest worker over the ideal.

    Args:
        workloads: as `benchmarks.sharding.__main__.Comparison.as_json` gives them.
    """
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(2, len(workloads), figsize=(3.4 * len(workloads), 6.4), sharex=True, squeeze=False)
    for column, workload in enumerate(workloads):
        for panel, (value, title) in zip(
            axes[:, column],
            (("prefill_over_tree", "prefill / tree"), ("slowdown", "busiest worker / ideal")),
            strict=True,
        ):
            for (way, cache), points in _series(workload["outcomes"], value).items():
                panel.plot(*zip(*points, strict=True), marker=".", label=f"{way}, {cache}")
            panel.set(xscale="log", yscale="log", ylabel=title if column == 0 else None)
        axes[0, column].set_title(workload["name"])
        axes[1, column].set_xlabel("workers")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path)
    pyplot.close(figure)


def _series(outcomes: Sequence[Mapping[str, Any]], value: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for outcome in outcomes:
        found.setdefault((outcome["way"], outcome["cache"]), []).append((outcome["num_workers"], outcome[value]))
    return found
