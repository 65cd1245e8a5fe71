"""Self-host or buy: figures of a run and a profile, and nothing where a figure has no source."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.reports.self_host import Work, break_even_tokens_per_day, load_profile, read_work, self_host
from moebeam.schemas.errors import JobFileError
from tests.support.paths import ROOT

PROFILES = ROOT / "jobs" / "reports" / "profiles"

WHOLE = """\
name = "ours"
accelerator = "card"
count = 2
currency = "USD"
hour_price_includes_energy = false
hour_price = { value = 3.6, source = "contract" }
utilisation = { value = 0.5, source = "monitoring" }
power_w = { value = 500, source = "measured" }
pue = { value = 1.2, source = "operator" }
energy_price_per_kwh = { value = 0.1, source = "contract" }
"""
WORK = Work(Decimal(1800), 10, prompt_tokens=900_000, cached_tokens=400_000, completion_tokens=100_000)
"""Half an hour, a million tokens, of which 600,000 were computed."""


def profile(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "profile.toml"
    path.write_text(text)
    return load_profile(str(path))


def test_a_whole_profile_gives_cost_energy_and_break_even(tmp_path: Path) -> None:
    made = self_host(profile(tmp_path, WHOLE), WORK)
    assert made.hours == Decimal(2)  # half an hour of two cards, half of which they stand idle
    assert made.hour_cost == Decimal("7.2")
    assert made.energy_kwh == Decimal("0.6")  # 2 x 500 W for half an hour, times 1.2
    assert made.energy_cost == Decimal("0.06")
    assert made.cost == made.cost_per_million == Decimal("7.26")
    assert made.joules_per_computed_token == Decimal("3.6")  # 2.16 MJ over 600,000 tokens
    assert made.hits_saved_kwh == Decimal("0.4")
    assert made.hits_saved_cost == Decimal("0.04")
    assert made.fixed_cost_per_day == Decimal("172.8")
    assert made.capacity_tokens_per_day is not None
    assert round(made.capacity_tokens_per_day) == 24_000_000
    assert made.asks == ()
    assert break_even_tokens_per_day(made, WORK, Decimal("8.70")) == Decimal(20_000_000)
    assert break_even_tokens_per_day(made, WORK, Decimal("0.06")) is None


def test_at_the_break_even_volume_both_ways_cost_the_same(tmp_path: Path) -> None:
    made = self_host(profile(tmp_path, WHOLE), WORK)
    price = Decimal("8.7")
    volume = break_even_tokens_per_day(made, WORK, price)
    assert volume is not None and made.fixed_cost_per_day is not None and made.energy_cost is not None
    energy = made.energy_cost * volume / WORK.num_tokens
    assert made.fixed_cost_per_day + energy == price * volume / 1_000_000


@pytest.mark.parametrize(
    ("key", "empty"),
    [
        ("hour_price", {"hour_cost", "cost", "cost_per_million", "fixed_cost_per_day"}),
        ("utilisation", {"hours", "hour_cost", "cost", "cost_per_million", "capacity_tokens_per_day"}),
        (
            "power_w",
            {
                *("energy_kwh", "energy_cost", "cost", "cost_per_million"),
                *("joules_per_computed_token", "hits_saved_kwh", "hits_saved_cost"),
            },
        ),
        (
            "pue",
            {
                *("energy_kwh", "energy_cost", "cost", "cost_per_million"),
                *("joules_per_computed_token", "hits_saved_kwh", "hits_saved_cost"),
            },
        ),
        ("energy_price_per_kwh", {"energy_cost", "cost", "cost_per_million", "hits_saved_cost"}),
        ("hour_price_includes_energy", {"cost", "cost_per_million"}),
    ],
)
def test_what_needs_a_missing_figure_stays_empty_and_is_asked_for(key: str, empty: set[str], tmp_path: Path) -> None:
    text = "\n".join(line for line in WHOLE.splitlines() if not line.startswith(f"{key} "))
    made = self_host(profile(tmp_path, text), WORK)
    assert {name for name in made.__dataclass_fields__ if getattr(made, name) is None} == empty
    (asked,) = made.asks
    assert asked.startswith(f"{key}: ")


def test_a_figure_without_a_source_is_not_used(tmp_path: Path) -> None:
    made = self_host(profile(tmp_path, WHOLE.replace('source = "measured"', 'source = " "')), WORK)
    assert made.energy_kwh is None
    assert made.asks == ("power_w: where 500 is from (`source`); without that it is not used",)


def test_energy_within_the_hour_price_is_not_charged_twice(tmp_path: Path) -> None:
    made = self_host(profile(tmp_path, WHOLE.replace("energy = false", "energy = true")), WORK)
    assert made.cost == made.hour_cost == Decimal("7.2")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("value = 0.5", "value = 1.5", "utilisation: expected a share above 0 and up to 1, found 1.5"),
        ("value = 1.2", "value = 0.9", r"pue: expected at least 1, found 0\.9"),
        ("power_w", "power_watts", "power_watts: Extra inputs"),
        ("value = 500", "value = -1", "power_w.value: .*found '?-1"),
        ("count = 2", "count = ", "expected a self-host profile in TOML"),
    ],
)
def test_a_wrong_profile_is_named(old: str, new: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=rf"profile\.toml: .*{expected}"):
        profile(tmp_path, WHOLE.replace(old, new))


@pytest.mark.parametrize("name", ["template.toml", "deepseek-v3-node.toml"])
def test_shipped_profiles_hold_no_figure_without_a_source(name: str) -> None:
    found = load_profile(str(PROFILES / name))
    figures = (found.hour_price, found.utilisation, found.power_w, found.pue, found.energy_price_per_kwh)
    assert all(figure.value is None or figure.source for figure in figures)
    assert self_host(found, WORK).asks


MANIFEST: dict[str, Any] = {
    "model": {"engine": "torch"},
    "engine": {"plan_s": 1.0, "extend_s": 2.0, "sample_s": 0.5, "retire_s": 0.5, "num_prompts": 2},
    "totals": {"num_attempts": 2, "prompt_tokens": 5, "cached_tokens": 2, "completion_tokens": 3},
}


def test_the_work_of_a_run_is_what_its_engine_counted() -> None:
    assert read_work(MANIFEST) == Work(Decimal("4.0"), 2, 5, 2, 3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"engine": {}}, "the engine 'torch' does not count its time"),
        ({"engine": {**MANIFEST["engine"], "num_prompts": 4}}, "counted 4 prompts for 2 attempts"),
        ({"totals": {**MANIFEST["totals"], "cached_tokens": None}}, "cached tokens are not known"),
        (
            {"engine": {**MANIFEST["engine"], **dict.fromkeys(("plan_s", "extend_s", "sample_s", "retire_s"), 0.0)}},
            "never",
        ),
    ],
)
def test_work_that_is_not_known_says_why(changes: dict[str, Any], expected: str) -> None:
    found = read_work({**MANIFEST, **changes})
    assert isinstance(found, str)
    assert expected in found
