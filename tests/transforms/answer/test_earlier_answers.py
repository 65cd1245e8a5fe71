"""An earlier run's answers, looked up by its fences."""

from pathlib import Path

import pyarrow as pa

from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.reuse import EarlierAnswers, ReuseSource, fences_path
from moebeam.transforms.plan.sorted_runs import write_rows


def test_the_fences_of_a_run_are_read_once_for_all_its_shards(tmp_path: Path) -> None:
    source = ReuseSource(str(tmp_path / "yesterday"), "run")
    layouts = [RunLayout(str(tmp_path / name)) for name in ("today", "tomorrow")]
    fences = pa.table({"shard": ["s000000"], "first": [b"a"], "last": [b"k"]})
    for layout in layouts:
        write_rows(fences_path(layout), fences)
    first, again, other = (EarlierAnswers.load(source, layouts[index]) for index in (0, 0, 1))
    assert first is again
    assert first is not other
    assert first.fences.equals(fences)
