"""Random schemas of draft 2020-12 that mix keywords as nobody would, for properties that hold for every schema."""

from typing import Any

from hypothesis import strategies as st

from moebeam.schemas.canonical import Json

NAMES = ["a", "b", "kind", "ab"]
PATTERNS = [
    "^a",
    "b$",
    "^[a-z]+$",
    '^[^"]*$',
    r"^\d{2}$",
    "a|b",
    "^.{2,4}$",
    r"^(?=.*\d)[a-z\d]{2,5}$",
    r"^[A-Z][\w -]*$",
]
FORMATS = ["date", "time", "email", "uri", "uuid", "ipv4", "ipv6", "hostname", "duration", "json-pointer", "custom"]
VALUES: list[Json] = ["a", "b", "", 0, 1, 2.5, -3, True, False, None, [1], {"a": 1}, "12", "ab"]

values = st.sampled_from(VALUES)
names = st.sampled_from(NAMES)


def _optional(type_name: str, **keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({"type": st.just(type_name)}, optional=keywords)


_scalars: st.SearchStrategy[Json] = st.one_of(
    st.sampled_from([True, {}, {"type": "boolean"}, {"type": "null"}]),
    st.builds(lambda value: {"const": value}, values),
    st.builds(lambda found: {"enum": found}, st.lists(values, min_size=1, max_size=3)),
    _optional(
        "number",
        minimum=st.sampled_from([0, -5, 1.5, 0.1, -0.25]),
        exclusiveMaximum=st.sampled_from([100, 1, 12.75]),
        multipleOf=st.sampled_from([1, 0.5, 0.01, 3, 7]),
    ),
    _optional("integer", exclusiveMinimum=st.sampled_from([0, 1.5]), maximum=st.sampled_from([10, 99.5])),
    _optional("string", minLength=st.integers(0, 3), maxLength=st.integers(2, 9)),
    _optional("string", pattern=st.sampled_from(PATTERNS), maxLength=st.integers(4, 9)),
    _optional("string", format=st.sampled_from(FORMATS)),
)


def _compose(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    pair = st.lists(inner, min_size=1, max_size=2)
    maps = st.dictionaries(names, inner, min_size=1, max_size=3)
    lists = _optional(
        "array",
        items=inner,
        prefixItems=pair,
        minItems=st.integers(0, 2),
        maxItems=st.integers(1, 3),
        uniqueItems=st.booleans(),
        unevaluatedItems=st.just(False),
    )
    objects = _optional(
        "object",
        properties=maps,
        required=st.lists(names, max_size=2, unique=True),
        additionalProperties=st.just(False) | inner,
        patternProperties=st.dictionaries(st.sampled_from(["^a", "b$", "^k"]), inner, max_size=1),
        propertyNames=st.sampled_from([{"pattern": "^[a-z]+$"}, {"enum": NAMES}, {"maxLength": 3}]),
        minProperties=st.integers(0, 2),
        maxProperties=st.integers(1, 3),
    )
    joined = st.builds(
        lambda base, more: {**more, **base} if isinstance(base, dict) else more,
        objects,
        st.fixed_dictionaries(
            {},
            optional={
                "allOf": pair,
                "anyOf": pair,
                "oneOf": pair,
                "not": inner,
                "if": inner | st.builds(lambda value: {"properties": {"kind": {"const": value}}}, values),
                "then": inner,
                "else": inner,
                "dependentRequired": st.dictionaries(names, st.lists(names, max_size=1), max_size=1),
                "dependentSchemas": st.dictionaries(names, inner, max_size=1),
                "unevaluatedProperties": st.just(False),
                "$ref": st.just("#/$defs/d"),
            },
        ),
    )
    unions = st.builds(lambda keyword, found: {keyword: found}, st.sampled_from(["anyOf", "oneOf", "allOf"]), pair)
    return st.one_of(lists, objects, joined, unions)


def schemas() -> st.SearchStrategy[Json]:
    """Schemas whose one definition they may refer to, and it to itself."""
    inner = st.recursive(_scalars, _compose, max_leaves=5)
    return st.builds(
        lambda root, definition: {**root, "$defs": {"d": definition}} if isinstance(root, dict) else root,
        _compose(inner),
        inner,
    )
