"""Jobs whose answers come over HTTP from a server of the test, which answers by the row and counts its calls."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebeam.jobs.check.job_file import read_job
from moebeam.schemas.job.sections import Job
from tests.support.jobs.jobs_for_tests import write_parquet
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek

KEY_VARIABLE = "MOEBEAM_TEST_KEY"
KEY = "sk-never-to-be-seen-0123456789"
MODEL = "deepseek-v4-flash"
PRICES = f"""\
provider,model,effective_from_utc,effective_to_utc,window_utc,currency,cache_hit_per_mtok,cache_miss_per_mtok,\
output_per_mtok,evidence,note
deepseek,{MODEL},2020-01-01T00:00:00Z,,,USD,0.028,0.14,0.28,the mission's reference prices,
deepseek,deepseek-v4-pro,2020-01-01T00:00:00Z,,,USD,0.145,1.74,3.48,the mission's reference prices,
vllm,{MODEL},2020-01-01T00:00:00Z,,,USD,0,0,0,made up,
"""
SCHEMA = {
    "type": "object",
    "properties": {"category": {"type": "string"}},
    "required": ["category"],
    "additionalProperties": False,
}


@dataclass
class Answers:
    """What the server says: by the row in the first user message, and by whether it was asked before.

    Attributes:
        broken: rows whose first answer is no JSON.
        refused: rows that the content filter refuses.
    """

    broken: frozenset[int] = frozenset()
    refused: frozenset[int] = frozenset()
    delay_s: float = 0.0
    num_calls: Counter[int] = field(default_factory=Counter[int])

    def __call__(self, call: Call) -> Reply:
        turns = [message["content"] for message in call.body["messages"] if message["role"] == "user"]
        row = int(turns[0].split("ticket ")[1].split(":")[0])
        self.num_calls[row] += 1
        if row in self.refused:
            body = deepseek("", finish_reason="content_filter", hit=0, miss=50 + row, completion=1)
        elif row in self.broken and len(turns) == 1:
            body = deepseek("no json", hit=10, miss=40 + row, completion=2)
        else:
            body = deepseek('{"category": "fine"}', hit=30, miss=20 + row * len(turns), completion=5)
        return Reply(body, delay_s=self.delay_s)


def write_tickets(folder: Path, num_rows: int) -> Path:
    """The input, and beside it the schema and prices of `remote_job`."""
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    (folder / "prices.csv").write_text(PRICES)
    rows = range(num_rows)
    columns = {
        "text": [f"ticket {row}: the printer is on fire" for row in rows],
        "tenant": [("acme", "zeta")[row % 2] for row in rows],
        "n": list(rows),
    }
    return write_parquet(folder / "in.parquet", columns)


def remote_job(folder: Path, output: Path, endpoint: FakeEndpoint, /, **sections: Mapping[str, Any]) -> Job:
    """A job over `write_tickets` that asks `endpoint`; `sections` update it key by key."""
    values: dict[str, dict[str, Any]] = {
        "input": {"path": str(folder / "in.parquet"), "tenant_column": "tenant", "passthrough": ["n"]},
        "prompt": {"system": "You sort tickets. " * 20, "template": "{{ text }}"},
        "output": {"path": str(output), "schema": str(folder / "schema.json"), "max_reject_share": 1.0},
        "model": {
            "engine": "openai",
            "provider": "deepseek",
            "name": MODEL,
            "base_url": endpoint.base_url,
            "api_key_variable": KEY_VARIABLE,
            "max_retries": 1,
        },
        "sampling": {"max_tokens": 64},
        "thinking": {"mode": "disabled"},
        "accounting": {"price_book": str(folder / "prices.csv")},
        "failures": {"max_retries": 0},
        "plan": {"max_shard_rows": 8},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return read_job(values)
