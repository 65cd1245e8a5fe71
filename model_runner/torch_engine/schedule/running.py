"""A prompt on its way through the engine. Free of torch."""

from dataclasses import dataclass, field

import numpy as np

from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node
from moebeam.model_runner.torch_engine.schedule.sequences import Prompt
from moebeam.schemas.records import TokenIds


@dataclass(slots=True, eq=False)
class Running:
    """A planned prompt and its answer so far: waiting at first and after a preemption, running in between.

    Attributes:
        node: its private node.
        answer: its tokens so far; those of `node.token_ids + answer` that are not computed go through the model next.
        reserved_end: position up to which memory is reserved.
        num_cached_tokens: prompt tokens that were computed when it was first admitted; -1 before that.
        admitted_s: seconds since the epoch, of the first admission.
    """

    prompt: Prompt
    node: Node
    answer: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    reserved_end: int = 0
    num_cached_tokens: int = -1
    admitted_s: float = 0.0
    num_preemptions: int = 0

    @property
    def num_left(self) -> int:
        """Tokens that must go through the model before the next can be sampled."""
        return self.node.num_tokens + len(self.answer) - self.node.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether the prompt is computed and only tokens of the answer are left."""
        return self.node.num_computed >= self.node.num_tokens and bool(self.answer)

    def next_tokens(self, num_tokens: int) -> TokenIds:
        """The next tokens to go through the model; int32, shape (num_tokens,)."""
        start, num_own = self.node.num_computed, self.node.num_tokens
        if start >= num_own:
            return np.array(self.answer[start - num_own : start - num_own + num_tokens], dtype=np.int32)
        own = self.node.token_ids[start : start + num_tokens]
        if own.shape[0] == num_tokens:
            return own
        return np.concatenate([own, np.array(self.answer[: num_tokens - own.shape[0]], dtype=np.int32)])
