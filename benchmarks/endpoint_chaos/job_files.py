"""The input, prices and job file of a script's runs; apart from `questions.py`, since the server needs none of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.endpoint_chaos.questions import MAX_TOKENS, question
from tests.support.jobs.jobs_for_tests import write_parquet, write_sections
from tests.support.jobs.remote_jobs import KEY_VARIABLE, MODEL, PRICES


def write_questions(folder: Path, num_rows: int) -> None:
    """Write the input and the price book."""
    rows = range(num_rows)
    write_parquet(folder / "in.parquet", {"text": [question(row) for row in rows], "n": list(rows)})
    (folder / "prices.csv").write_text(PRICES)


def write_job_file(folder: Path, base_url: str, **sections: Mapping[str, Any]) -> Path:
    """The job over `write_questions` as a file for the command line; `sections` update it key by key.

    Its output is `out` in the same folder.
    """
    values: dict[str, dict[str, Any]] = {
        "input": {"path": str(folder / "in.parquet"), "passthrough": ["n"]},
        "prompt": {"template": "{{ text }}"},
        "output": {"path": str(folder / "out"), "max_reject_share": 1.0},
        "model": {
            "engine": "openai",
            "provider": "deepseek",
            "name": MODEL,
            "base_url": base_url,
            "api_key_variable": KEY_VARIABLE,
        },
        "sampling": {"max_tokens": MAX_TOKENS},
        "thinking": {"mode": "disabled"},
        "accounting": {"price_book": str(folder / "prices.csv")},
        "plan": {"max_shard_rows": 16},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return write_sections(values, folder / "job.toml")
