"""Names of providers: one set for job files, profiles, price books and tables.

A provider's first name is its profile's, which stands in tables and identities; its other names are taken wherever a
person writes one.
"""

from difflib import get_close_matches

PROVIDER_ALIASES = {
    "alibaba-bailian": "alibaba",
    "azure-openai": "azure",
    "fireworks-ai": "fireworks",
    "tencent-tokenhub": "tencent",
    "together-ai": "together",
    "volcengine-ark": "volcano",
}
"""Other name -> first name."""


def name_provider(name: str) -> str:
    """The first name of a provider; unknown names are their own."""
    return PROVIDER_ALIASES.get(name, name)


def suggest_provider(name: str, known: list[str]) -> str:
    """A suggestion to end an error message with; empty where no known name is near."""
    near = get_close_matches(name, [*known, *PROVIDER_ALIASES], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
