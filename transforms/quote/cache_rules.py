"""How many prompt tokens a provider's cache is expected to serve, by its documented rule.

Part of the quote. Requests are taken in plan order, one after another; concurrent requests cannot hit what is not
stored yet, so a rule gives an expectation, never a promise. A quote's bounds do not rest on it: they run from no hit at
all to every token shared in the prefix tree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from moebeam.model_runner.vllm_engine.prefix_units import PrefixUnit, reachable_hits
from moebeam.transforms.quote.prompt_survey import Counts, PromptSurvey

RuleName: TypeAlias = Literal["prefix_tree", "stored_units", "whole_units", "none", "unknown"]


@dataclass(frozen=True, slots=True)
class CacheRule:
    """How a provider caches prompts.

    Attributes:
        meaning: the rule in words, with its source.
        unit: of the rule `whole_units`.
    """

    name: RuleName
    meaning: str
    unit: PrefixUnit | None = None


TREE = CacheRule("prefix_tree", "every token shared with an earlier request of the shard (our own engine)")
UNITS = CacheRule(
    "stored_units",
    "a stored unit must match whole; units end at the end of an input and where two inputs were found to part "
    "(DeepSeek's documents; units at fixed intervals are left out, their length is not published)",
)
NONE = CacheRule("none", "nothing is kept between requests")
UNKNOWN = CacheRule("unknown", "no rule is documented; expected without a hit")

RULES: Mapping[str, CacheRule] = {
    "torch": TREE,
    "fake": TREE,
    "transformers": NONE,
    "deepseek": UNITS,
}
"""Rules by provider, or by engine for what runs here."""


def unit_rule(unit: PrefixUnit) -> CacheRule:
    """The rule of a cache that is hit at every so many tokens, vLLM's."""
    meaning = f"every whole {unit.num_tokens:,} tokens shared with an earlier request of the shard (vLLM's blocks)"
    return CacheRule("whole_units", meaning, unit)


def find_rule(provider: str, engine: str) -> CacheRule:
    """A provider's rule; for `local`, the rule of the in-process engine."""
    return RULES.get(engine if provider == "local" else provider, UNKNOWN)


def estimate_hits(survey: PromptSurvey, rule: CacheRule) -> Counts:
    """Tokens of each request that the cache is expected to serve: int64, shape (num_requests,)."""
    match rule.name:
        case "prefix_tree":
            return np.where(survey.starts_shard, 0, survey.num_shared_tokens)
        case "stored_units":
            return _unit_hits(survey)
        case "whole_units":
            assert rule.unit is not None
            hits = reachable_hits(survey.num_prompt_tokens, survey.num_shared_tokens, rule.unit)
            return np.where(survey.starts_shard, 0, hits)
        case "none" | "unknown":
            return np.zeros(survey.num_requests, dtype=np.int64)


def _unit_hits(survey: PromptSurvey) -> Counts:
    """Hits if only prefixes stored as a unit can be found.

    In token order, every unit that a request can hit lies on the path that it shares with the previous request.
    """
    hits = np.zeros(survey.num_requests, dtype=np.int64)
    units: list[int] = []  # lengths of stored units on the previous request's path, ascending
    pairs = zip(survey.num_prompt_tokens.tolist(), survey.num_shared_tokens.tolist(), strict=True)
    for index, (num_tokens, num_shared) in enumerate(pairs):
        while units and units[-1] > num_shared:
            units.pop()
        hits[index] = units[-1] if units else 0
        for end in (num_shared, num_tokens):
            if end and (not units or units[-1] < end):
                units.append(end)
    return hits
