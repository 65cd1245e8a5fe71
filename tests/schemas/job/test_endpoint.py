"""Addresses and names of keys in job files: what is refused, and that a key is never shown."""

import pytest
from pydantic import TypeAdapter, ValidationError

from moebeam.schemas.job.endpoint import Address, KeyVariable

ADDRESS: TypeAdapter[str] = TypeAdapter(Address)
VARIABLE: TypeAdapter[str] = TypeAdapter(KeyVariable)


@pytest.mark.parametrize("value", ["https://api.example/v1", "http://127.0.0.1:8000", "https://host.example:8443/a/b"])
def test_addresses_are_taken_without_the_slash_at_their_end(value: str) -> None:
    assert ADDRESS.validate_python(value) == ADDRESS.validate_python(f"{value}/") == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        "api.example/v1",
        "ftp://api.example",
        "https://",
        "https://host:port/",
        "https://host:0/",
        "https://user:word@host/v1",
        "https://host/v1?api_key=x",
        "https://host/v1#x",
        "https://[::1/v1",
    ],
)
def test_other_addresses_are_refused(value: str) -> None:
    with pytest.raises(ValidationError, match="expected an address"):
        ADDRESS.validate_python(value)


def test_a_key_in_place_of_its_name_is_refused_without_being_shown() -> None:
    assert VARIABLE.validate_python("DEEPSEEK_API_KEY") == "DEEPSEEK_API_KEY"
    for value in ("sk-0123456789abcdef", "lower_case", "", "A" * 200, "AB CD"):
        with pytest.raises(ValidationError) as caught:
            VARIABLE.validate_python(value)
        assert "NAME of an environment variable" in str(caught.value.errors()[0]["msg"])
        assert not value or value not in caught.value.errors()[0]["msg"]
