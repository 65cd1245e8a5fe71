"""The steps of CONTRIBUTING.md for a provider profile, followed."""

import json
import re
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from moebeam.jobs.commands.cli import run_command
from moebeam.model_runner.openai_engine import profiles as profiles_module
from moebeam.model_runner.openai_engine.profiles import Profile, find_profile, profiles
from tests.support.paths import ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def section(title: str) -> str:
    return re.split(rf"^## {re.escape(title)}$", CONTRIBUTING, flags=re.MULTILINE)[1].partition("\n## ")[0]


def profile_table() -> str:
    """The TOML block of the list's second step."""
    (block,) = re.findall(r"^ *```toml\n(.*?)^ *```$", section("Add a provider profile"), re.MULTILINE | re.DOTALL)
    return re.sub(r"^   ", "", block, flags=re.MULTILINE)


@pytest.fixture
def with_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Step 2 on a copy: the table appended to `profiles.toml`."""
    find_files = resources.files
    package = "moebeam.model_runner.openai_engine"
    text = find_files(package).joinpath("profiles.toml").read_text("utf-8")
    (tmp_path / "profiles.toml").write_text(f"{text}\n{profile_table()}", "utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(
            profiles_module.resources, "files", lambda anchor: tmp_path if anchor == package else find_files(anchor)
        )
        profiles.cache_clear()
        yield
    profiles.cache_clear()


def test_the_table_is_a_profile() -> None:
    ((name, table),) = tomllib.loads(profile_table()).items()
    profile = Profile.model_validate({"name": name, **table})
    assert (profile.name, profile.evidence) == ("example", "untested")
    assert profile.api_key_variable == "EXAMPLE_API_KEY"


def test_the_appended_profile_is_found_and_leaves_the_others(with_profile: None) -> None:
    assert find_profile("example").base_url == "https://api.example.com/v1"
    assert find_profile("deepseek").name == "deepseek"


def test_validate_checks_the_profile_and_asks_nobody(
    with_profile: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"custom_id": "a", "body": {"model": "m", "messages": [{"role": "user", "content": "hello"}]}}
    line |= {"method": "POST", "url": "/v1/chat/completions"}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    job = tmp_path / "job.toml"
    job.write_text(
        '[input]\npath = "in.jsonl"\n[output]\npath = "out"\n'
        '[model]\nengine = "openai"\nprovider = "example"\nname = "model-1"\n'
    )
    monkeypatch.delenv("EXAMPLE_API_KEY", raising=False)
    assert run_command(["validate", str(job), "--quiet"]) == 2, "the key is missing"
    monkeypatch.setenv("EXAMPLE_API_KEY", "not-a-key")
    assert run_command(["validate", str(job), "--quiet"]) == 0
    assert not (tmp_path / "out").exists()


def test_the_lists_are_numbered_without_gaps() -> None:
    for title in ("Add an engine", "Add an architecture", "Add an encoding", "Add a provider profile"):
        numbers = [int(number) for number in re.findall(r"^(\d+)\. ", section(title), re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)) and numbers
