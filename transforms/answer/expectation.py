"""Expectation: what a request in flight is likely to take, learnt from those already answered.

Part of *answer*, below the budget (`transforms/answer/budget.py`). A request may take its prompt at the miss price and
all of its `max_tokens`; how much of that answers really take is the same from request to request of one job, more or
less. Before the first answer everything is expected to take all that it may.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from itertools import product

from moebeam.model_runner.openai_engine.options import OpenAIOptions
from moebeam.model_runner.openai_engine.profiles import DEFAULT_PROFILE
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.prices import PriceMode, find_tier_mode
from moebeam.schemas.records import Request, Usage
from moebeam.transforms.answer.spending import Spent
from moebeam.transforms.money.account import Accounting, charge


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What requests may take at most.

    Attributes:
        candidates: provider and model of everyone who may answer, as price books name them.
    """

    accounting: Accounting = field(default_factory=lambda: Accounting(""))
    candidates: tuple[tuple[str, str], ...] = ()
    mode: PriceMode = "online"

    @classmethod
    def from_engine(cls, accounting: Accounting, engine: EngineConfig) -> "Ceiling":
        """The ceiling of a job's requests."""
        mode: PriceMode = "batch" if engine.options.is_batch else "online"
        return cls(accounting, tuple(dict.fromkeys(_candidates(accounting, engine))), mode)

    def most(self, request: Request) -> Spent:
        """What a request that starts now may take; without a price its cost is 0, and the answer's will be unknown."""
        num_input, num_output = request.num_prompt_tokens, request.sampling.max_tokens
        cost, now = Decimal(0), datetime.now(UTC)
        # A provider may answer in its ordinary tier where another one was asked for.
        asked: PriceMode = find_tier_mode(request.options.service_tier)
        modes = (self.mode,) if self.mode == "batch" else dict.fromkeys((asked, "online"))
        for (provider, model), mode in product(self.candidates, modes):
            line = self.accounting.find_price(provider, model, now, prompt_tokens=num_input, mode=mode)
            if line is not None:
                cost = max(cost, charge(Usage(num_input, num_output, None), line).cost)
        return Spent(1, num_input, num_output, cost)


def _candidates(accounting: Accounting, engine: EngineConfig) -> Iterator[tuple[str, str]]:
    options = engine.options
    if isinstance(options, OpenAIOptions):
        named = [(options.provider or DEFAULT_PROFILE, engine.name)]
        named += [(fallback.provider, fallback.name or engine.name) for fallback in options.fallbacks]
        named += [(route.provider or options.provider or DEFAULT_PROFILE, route.name) for route in options.routes]
    else:
        named = [("fake" if engine.engine == "fake" else "local", engine.name)]
    for provider, model in named:
        yield accounting.provider or provider, accounting.model or model


@dataclass(slots=True)
class Expectation:
    """What a job's requests take of what they may take at most."""

    _most: Spent = field(default_factory=Spent)
    _taken: Spent = field(default_factory=Spent)

    def expect(self, most: Spent) -> Spent:
        """What a request is expected to take that may take `most`.

        Prompts are counted or estimated before, so their share may be above 1.
        """
        return Spent(
            most.num_requests,
            _part(most.input_tokens, self._taken.input_tokens, self._most.input_tokens),
            _part(most.output_tokens, self._taken.output_tokens, self._most.output_tokens),
            most.cost * self._taken.cost / self._most.cost if self._most.cost else most.cost,
        )

    def learn(self, most: Spent, taken: Spent) -> None:
        """Take one answer into account."""
        self._most += most
        self._taken += taken


def _part(tokens: int, num_taken: int, num_most: int) -> int:
    return round(tokens * Fraction(num_taken, num_most)) if num_most else tokens
