"""Beam counters of all stages, on any runner.

Counters stand in a namespace a stage (`read`, `render`, `plan`, `answer`, `publish`, and `engine` for its time by
phase). A runner that repeats a bundle may count it again; the exact sums stand in the manifest.
"""

from collections.abc import Mapping

import apache_beam as beam


def add_to_counters(stage: str, amounts: Mapping[str, float]) -> None:
    """Add to a stage's counters; parts of a unit are cut off."""
    for name, amount in amounts.items():
        if int(amount):
            beam.metrics.Metrics.counter(stage, name).inc(int(amount))
