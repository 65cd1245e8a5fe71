"""Provider profiles as data."""

from importlib import resources

import pytest
from pydantic import ValidationError

from moebeam.jobs.prices.shipped import BUILTIN, load_named_book
from moebeam.model_runner.openai_engine.profiles import Profile, find_profile, profiles
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.providers import PROVIDER_ALIASES


def test_every_profile_of_the_mission_is_there_and_says_whether_it_was_tested() -> None:
    found = profiles()
    tested = {"deepseek", "alibaba", "volcano", "vllm", "sglang", "openai"}
    assert {name for name, profile in found.items() if profile.evidence == "tested"} == tested
    assert {"tencent", "huawei"} <= {name for name, profile in found.items() if profile.evidence == "untested"}
    assert all(name == profile.name for name, profile in found.items())


def test_no_profile_holds_a_key() -> None:
    text = resources.files("moebeam.model_runner.openai_engine").joinpath("profiles.toml").read_text("utf-8")
    assert "sk-" not in text
    assert all(profile.api_key_variable.isupper() for profile in profiles().values())


def test_deepseek_limits_are_those_of_its_models() -> None:
    deepseek = find_profile("deepseek")
    assert deepseek.concurrency_for("deepseek-v4-flash") == 2500
    assert deepseek.concurrency_for("DeepSeek-V4-Pro") == 500
    assert deepseek.concurrency_for("something-new") == 500


def test_unknown_provider_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(EngineLoadError, match=r"provider: expected one of alibaba, azure, .*found 'nobody'$"):
        find_profile("nobody")
    with pytest.raises(EngineLoadError, match=r"found 'open-router'; did you mean 'openrouter'\?$"):
        find_profile("open-router")


def test_other_names_of_a_provider_lead_to_its_profile() -> None:
    for name, first in PROVIDER_ALIASES.items():
        assert find_profile(name).name == first
    assert not PROVIDER_ALIASES.keys() & profiles().keys()


def test_the_shipped_book_knows_providers_by_the_names_of_their_profiles() -> None:
    book = load_named_book(BUILTIN)
    assert {line.provider for line in book.lines} - profiles().keys() == {"bedrock"}


@pytest.mark.parametrize("name", ["openrouter", "siliconflow", "fireworks", "together", "azure"])
def test_profiles_from_documents_alone_say_so(name: str) -> None:
    assert find_profile(name).evidence == "untested"


def test_misspelt_key_of_a_profile_is_refused() -> None:
    values = find_profile("deepseek").model_dump() | {"cached_token": ("x",)}
    with pytest.raises(ValidationError, match="cached_token"):
        Profile.model_validate(values)
