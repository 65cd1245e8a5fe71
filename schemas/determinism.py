"""What an engine promises about asking the same request again: in another batch, another run, on another day.

A loaded engine gives the record (`PromisingRunner` of `model_runner/protocol.py`), each shard's commit keeps it, the
manifest states the weakest of a run, and `moebeam compare` shows those of two runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Promise: TypeAlias = Literal["bitwise", "tokens", "none"]

PROMISES: dict[Promise, str] = {
    "bitwise": "greedy answers and their log probabilities repeat to the last bit, whatever else is in the batch",
    "tokens": "greedy answers repeat token for token, whatever else is in the batch, unless two tokens are equally "
    "likely within the rounding of float32; log probabilities repeat within that rounding",
    "none": "answers may differ from run to run",
}
"""The promises in words, the strongest first."""


@dataclass(frozen=True, slots=True)
class Determinism:
    """An engine's promise, as it was loaded.

    Attributes:
        reason: what the promise rests on, for users: device, type of numbers, a setting, or who answers.
        is_seeded: whether the promise holds for sampled answers with a `seed`, too.
    """

    promise: Promise
    reason: str
    is_seeded: bool

    def describe(self) -> str:
        """The promise on one line."""
        sampled = "" if self.promise == "none" else f"; sampled answers with a seed {_do(self.is_seeded)}"
        return f"{self.promise}: {PROMISES[self.promise]}{sampled} ({self.reason})"


def merge_determinisms(given: Iterable[Determinism]) -> Determinism | None:
    """What holds where several engines answered: the weakest promise, with the reasons of all that are as weak.

    Returns:
        None if nobody promised anything, as in a run that asked nothing.
    """
    found = set(given)
    if not found:
        return None
    order: list[Promise] = [*PROMISES]
    weakest = order[max(order.index(each.promise) for each in found)]
    reasons = sorted({each.reason for each in found if each.promise == weakest})
    return Determinism(weakest, "; ".join(reasons), all(each.is_seeded for each in found))


def _do(is_seeded: bool) -> str:
    return "do, too" if is_seeded else "do not"


def promise_of_arithmetic(dtype: str, device: str) -> Determinism:
    """What holds of models that torch computes batch by batch.

    Products of other shapes add up in another order. In float32 on a CPU that moved log probabilities by less than
    2e-5 and no token, alone and among 95 others; the same batch gave the same bits, on one thread and on two. In
    bfloat16 the order alone changes answers, and other devices were not measured.

    Args:
        dtype: of the products, such as `float32`.
        device: its kind, such as `cpu`.
    """
    if dtype == "float32" and device == "cpu":
        return Determinism("tokens", "float32 on cpu", is_seeded=True)
    why = "not measured" if dtype == "float32" else "products of another batch round otherwise"
    return Determinism("none", f"{dtype} on {device}: {why}", is_seeded=False)


NO_PROMISE = Determinism("none", "nobody promised anything", is_seeded=False)
REMOTE = Determinism(
    "none", "a provider answers, whose batches, hardware and versions change; a seed is a wish to it", is_seeded=False
)
