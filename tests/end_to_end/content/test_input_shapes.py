"""Inputs as people have them: partition folders, odd names, files that cannot be read, and an earlier run's results."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs.jobs_for_tests import priced, read_table, run_fake_job, write_parquet
from tests.support.jobs.parquet_bytes import Leaf, Node, write_parquet_bytes

PASSED = {"prefix": "in_", "rename": {"team": "squad"}}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for country, text in (("DE", "gut"), ("FR", "bon")):
        columns = {"review.text": [text], "model": ["m"], "team": [country.lower()]}
        write_parquet(tmp_path / "in" / f"country={country}" / "year=2026" / "a.parquet", columns)
    leaves = [Leaf(("team",), "int32", [0], is_encrypted=True)]
    nodes = [Node("team", kind="int32")]
    write_parquet_bytes(tmp_path / "in" / "country=DE" / "locked.parquet", nodes, leaves, 1, after_footer=bytes(28))
    return tmp_path / "in"


def test_folders_and_odd_names_reach_prompt_tags_and_tables_and_the_next_run_reads_them(
    source: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    sections: dict[str, Any] = {
        "input": {"path": str(source), "passthrough": PASSED},
        "prompt": {"template": '{{ row["review.text"] }} {{ country }} {{ year }}'},
        "accounting": {**priced(tmp_path), "tag_columns": ["team", "year"]},
        "output": {"max_reject_share": 1.0},
    }
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint, **sections)
    assert (summary.exit_code, summary.num_results, summary.num_unreadable) == (3, 2, 1)
    rows = read_table(tmp_path / "out", "results")
    names = ("in_review.text", "in_model", "squad", "in_country", "in_year")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("gut", "m", "de", "DE", 2026),
        ("bon", "m", "fr", "FR", 2026),
    ]
    tags = [dict(line["tags"]) for line in read_table(tmp_path / "out", "ledger")]
    assert tags == [{"team": "de", "year": "2026"}, {"team": "fr", "year": "2026"}]
    (reject,) = read_table(tmp_path / "out", "rejects")
    assert (reject["scope"], reject["error_type"]) == ("file", "unreadable_file")

    judged = {"path": str(tmp_path / "out"), "id_column": "custom_id", "passthrough": ["squad"]}
    template = "{{ output_text }} {{ in_country }} {{ model }}"
    run_fake_job(tmp_path, tmp_path / "next", tiny_checkpoint, input=judged, prompt={"template": template})
    after = read_table(tmp_path / "next", "results")
    assert [(row["custom_id"], row["squad"]) for row in after] == [(row["custom_id"], row["squad"]) for row in rows]
