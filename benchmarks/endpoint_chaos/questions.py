"""The rows that a script's runs ask, and what the server answers to each.

An answer depends on its row alone, so that however a run was disturbed its tables equal those of an undisturbed one.
"""

from decimal import Decimal
from typing import Any

from tests.support.servers.fake_endpoint import deepseek, with_usage

MAX_TOKENS = 256
MAX_PROMPT_TOKENS = 600
"""More than the server says of any prompt."""

_HIT_PRICE, _MISS_PRICE, _OUTPUT_PRICE = Decimal("0.028"), Decimal("0.14"), Decimal("0.28")
"""Of the price book, in USD per million tokens."""

MAX_PRICE = (MAX_PROMPT_TOKENS * _MISS_PRICE + MAX_TOKENS * _OUTPUT_PRICE) / 10**6
"""More than any request can cost, in USD."""


def question(row: int) -> str:
    """The prompt of a row."""
    return f"question {row} of the table"


def row_of(text: str) -> int:
    """The row of a prompt."""
    return int(text.split("question ")[1].split(" ")[0])


def is_refused(row: int) -> bool:
    """Whether the provider refuses this row for what it holds; only in scripts with refusals."""
    return row % 20 == 7


def lacks_usage(row: int) -> bool:
    """Whether the answer does not say what it cost; only in scripts where usage may be missing."""
    return row % 10 == 3


def find_answer(row: int, *, may_lack_usage: bool) -> dict[str, Any]:
    """The whole response to a row, in DeepSeek's form."""
    answer = deepseek(
        f"answer to question {row}: " + "word " * (row % 7),
        hit=30 + row % 3 * 10,
        miss=100 + row * 7,
        completion=20 + row % 13 * 10,
    )
    return with_usage(answer, None) if may_lack_usage and lacks_usage(row) else answer


def find_cost(row: int) -> Decimal:
    """What the answer costs, in USD, where it says so."""
    usage = find_answer(row, may_lack_usage=False)["usage"]
    hit, miss = usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]
    return (hit * _HIT_PRICE + miss * _MISS_PRICE + usage["completion_tokens"] * _OUTPUT_PRICE) / 10**6
