"""The rotary settings of a `config.json`: checked, in the one form that `transformers` 5 reads, and their context.

Files have them as `rope_theta` beside `rope_scaling`, as `rope_parameters`, or as one set for each type of layers.
"""

from collections.abc import Iterator, Mapping
from typing import TypeAlias, cast

from moebeam.model_runner.checkpoint.config_rules import LATENT
from moebeam.model_runner.checkpoint.value_rules import (
    COUNT,
    FLAG,
    POSITIVE,
    SHARE,
    Rule,
    Values,
    is_number,
    list_of,
    number_above,
    number_of_at_least,
    one_of,
)
from moebeam.schemas.canonical import Json

BY_LENGTH = ("dynamic", "longrope")
"""Types whose frequencies depend on the length of a sequence."""

_FACTOR = number_of_at_least(1)
_NOT_NEGATIVE = number_of_at_least(0)

_KINDS: dict[str, dict[str, Rule]] = {
    "default": {},
    "linear": {"factor": _FACTOR},
    "dynamic": {"factor": _FACTOR},
    "yarn": {
        "factor": _FACTOR,
        "original_max_position_embeddings": COUNT,
        "beta_fast": POSITIVE.or_null(),
        "beta_slow": POSITIVE.or_null(),
        "mscale": _NOT_NEGATIVE.or_null(),
        "mscale_all_dim": _NOT_NEGATIVE.or_null(),
        "truncate": FLAG,
        "attention_factor": POSITIVE.or_null(),
    },
    "longrope": {
        "short_factor": list_of(POSITIVE),
        "long_factor": list_of(POSITIVE),
        "factor": _FACTOR.or_null(),
        "original_max_position_embeddings": COUNT,
        "attention_factor": POSITIVE.or_null(),
    },
    "llama3": {
        "factor": _FACTOR,
        "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE,
        "original_max_position_embeddings": COUNT,
    },
}
_REQUIRED = ("factor", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor")
_BY_LABEL = "deepseek_v4"
_PARTIAL = "glm4_moe"
"""The architecture that rotates the first elements of a head alone."""
_UNSURE = "gpt_oss"
"""The architecture that `transformers` gives settings of gpt-oss-20b where the file has none, and others do not."""
_KINDS_BY_LABEL = ("default", "linear", "llama3", "yarn")
"""Of DeepSeek-V4, whose compressed entries have a position but belong to sequences of any length."""

_THETA = number_above(1)
_OLD_NAMES = {"su": "longrope"}

Problem: TypeAlias = tuple[str, str, Json]
"""A key, what was expected and what was found."""


def normalize_rope(model_type: str, values: dict[str, Json]) -> list[Problem]:
    """Write the rotary settings of a configuration as `rope_parameters`, in place, and list what is wrong with them."""
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    found = values.pop("rope_scaling", None) or values.get("rope_parameters") or {}
    if not isinstance(found, dict):
        return [(key, "an object or null", found)]
    if not found and model_type == _UNSURE:
        return [(key, f"an object with a rope_type, for a {model_type} without one is read in different ways", None)]
    problems: list[Problem] = []
    if "rope_theta" in values and not _THETA.holds(values["rope_theta"]):
        problems.append(("rope_theta", _THETA.expected, values["rope_theta"]))
    sets: dict[str, Json] = {label: one for label, one in found.items() if isinstance(one, dict)}
    if not sets:
        sets = {"": found}
    elif model_type != _BY_LABEL:
        sets = _used_sets(values, sets)
    standard = {label: _standardize(one, values) for label, one in sets.items()}
    for label, one in standard.items():
        place = f"{key}.{label}" if label else key
        problems += [
            (f"{place}.{name}", expected, value) for name, expected, value in _list_problems(model_type, one, values)
        ]
    if model_type != _BY_LABEL and len({repr(sorted(one.items())) for one in standard.values()}) > 1:
        problems.append((key, f"one set for all layers of a {model_type}", cast("Json", found)))
    is_by_label = "" not in standard and model_type == _BY_LABEL
    values["rope_parameters"] = cast("Json", standard if is_by_label else next(iter(standard.values())))
    return problems


def derive_context(values: Values) -> int:
    """The most positions that a configuration is meant for, as vLLM derives it: a scaled rope stretches it.

    YaRN stretches the length of its pretraining; recipes for long contexts leave `max_position_embeddings` alone.
    """
    most = values.get("max_position_embeddings")
    stated = most if isinstance(most, int) else 0
    if "gemma3" in str(values.get("model_type", "")):
        return stated  # is stretched already
    found = values.get("rope_scaling") or values.get("rope_parameters")
    if not isinstance(found, dict):
        return stated
    sets = [one for one in found.values() if isinstance(one, dict)] or [found]
    return max(_stretch(cast("Values", one), values, stated) for one in sets)


def _stretch(rope: Values, values: Values, stated: int) -> int:
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if not is_number(factor) or factor < 1:
        return stated
    if kind in ("linear", "dynamic"):
        return int(stated * factor)
    if kind == "yarn":
        original = values.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", stated))
        return max(stated, int(original * factor)) if isinstance(original, int) else stated
    return stated


def _used_sets(values: Values, sets: dict[str, Json]) -> dict[str, Json]:
    """The sets of those types that some layer has; all where the file does not say."""
    types = values.get("layer_types")
    used = {label: one for label, one in sets.items() if isinstance(types, list) and label in types}
    return used or sets


def _standardize(rope: Json, values: Values) -> dict[str, Json]:
    """One set with the names of today, and with what older files have outside of it."""
    found = dict(cast("Mapping[str, Json]", rope))
    old = found.pop("type", None)
    kind = found.get("rope_type") or old or "default"
    found["rope_type"] = _OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if "rope_theta" in values:
        found.setdefault("rope_theta", values["rope_theta"])
    return found


def _list_problems(model_type: str, rope: dict[str, Json], values: Values) -> Iterator[Problem]:
    kind = rope["rope_type"]
    known = _KINDS_BY_LABEL if model_type == _BY_LABEL else tuple(_KINDS)
    if kind not in known:
        yield "rope_type", one_of(*known).expected, kind
        return
    rules = {**_KINDS[str(kind)], "rope_theta": _THETA}
    missing = [name for name in _REQUIRED if name in rules and name not in rope]
    checked = {**rope, **dict.fromkeys(missing)}
    for name, rule in rules.items():
        if name in checked and not rule.holds(checked[name]):
            yield name, rule.expected, checked[name]
            return
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if model_type == _PARTIAL:
        num_rotated = 2 * _count_pairs(model_type, values, partial)
        if not SHARE.or_null().holds(partial):
            yield "partial_rotary_factor", SHARE.expected, partial
        elif num_rotated < 2 or num_rotated != _count_rotated(values, partial):
            yield "partial_rotary_factor", "a share that leaves an even number of a head's elements", partial
    elif model_type in LATENT and partial not in (None, 1, 1.0):
        yield "partial_rotary_factor", "1, for qk_rope_head_dim counts the rotated elements", partial
    elif model_type != _BY_LABEL and kind != "default" and partial not in (None, 1, 1.0):
        yield "partial_rotary_factor", f"1, beside rope_type {kind!r}", partial
    if kind == "longrope":
        num_pairs = _count_pairs(model_type, values, partial)
        for name in ("short_factor", "long_factor"):
            factors = cast("list[Json]", rope[name])
            if len(factors) != num_pairs:
                yield name, f"a factor for each of {num_pairs} rotated pairs", len(factors)
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if kind == "llama3" and is_number(low) and is_number(high) and low >= high:
        yield "high_freq_factor", f"a number above low_freq_factor ({low:g})", high


def _count_pairs(model_type: str, values: Values, partial: Json) -> int:
    if model_type == _PARTIAL:
        return _count_rotated(values, partial) // 2
    width = values.get("qk_rope_head_dim" if model_type in LATENT else "head_dim")
    return width // 2 if isinstance(width, int) else 0


def _count_rotated(values: Values, partial: Json) -> int:
    """Rotated elements of a head of GLM-4.5: half of them where the file does not say."""
    width = values.get("head_dim")
    return int(width * (partial if is_number(partial) else 0.5)) if isinstance(width, int) else 0
