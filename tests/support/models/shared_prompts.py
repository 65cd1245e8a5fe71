"""Prompts that share none, some or all of their tokens, in every way that the engine tells apart."""

import random
from collections.abc import Callable

from tests.support.models.checkpoint_layouts import (
    random_tokens,
)

Prompts = list[list[int]]


BASE = random_tokens(1, 90)


def no_sharing() -> Prompts:
    """Lengths around the compression rates, the window of 16 and the rows from which a read is wide."""
    lengths = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 25, 33, 64, 75]
    return [[first, *random_tokens(100 + first, length - 1)] for first, length in enumerate(lengths)]


def full_sharing() -> Prompts:
    return [[*BASE[:70], 10 + i] for i in range(12)]


def nested_sharing() -> Prompts:
    """Four levels; branches that are one token, one window, and several tiles of rows long."""
    prompts: Prompts = []
    for i, cut in enumerate((5, 30, 61)):
        for j, length in enumerate((1, 16, 40)):
            group = BASE[:cut] + random_tokens(10 * i + j, length)
            prompts += [group + random_tokens(7 * k, 3 * k) for k in range(3)]
    return prompts


def identical_prompts() -> Prompts:
    return [BASE[:37]] * 5 + [BASE[:1]] * 2


def prefixes_of_each_other() -> Prompts:
    """Shorter than 4, than the rate of 8 and than the window of 16, at them, and behind them; one of them twice."""
    return [BASE[:n] for n in (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 50, 50, 90)]


def branches_everywhere() -> Prompts:
    """A branch at every position modulo 4, 8 and 16, so inside each kind of window and between two."""
    return [[*BASE[:p], (BASE[p] + 1) % 97, *random_tokens(p, p % 6)] for p in range(34)] + [BASE]


CASES: list[Callable[[], Prompts]] = [
    no_sharing,
    full_sharing,
    nested_sharing,
    identical_prompts,
    prefixes_of_each_other,
    branches_everywhere,
]


def mixed_prompts(seed: int) -> Prompts:
    """Some of everything, shuffled."""
    rng = random.Random(seed)
    base = random_tokens(seed, 60)
    groups = [base[: rng.randrange(1, 60)] + random_tokens(rng.random(), rng.randrange(30)) for _ in range(3)]
    prompts = [group + random_tokens(rng.random(), rng.randrange(8)) for group in groups for _ in range(3)]
    prompts += [base, base, base[:3], [5]]
    rng.shuffle(prompts)
    return prompts
