"""What an engine counts of its own work."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineCounters:
    """Sums since an engine was loaded.

    Attributes:
        num_tree_tokens: T, tokens of the prefix trees of all windows.
        num_computed_prefill_tokens: prompt tokens that went through the first layer.
        num_decode_tokens: tokens of answers that did.
        num_uncomputed_answer_tokens: tokens of answers that did not: the last of each answer, and tokens that a
            constraint forced right before it.
        num_preemptions: how often a running prompt lost its memory and went back to waiting.
        num_failed_steps: steps that raised, mostly out of memory, and were repeated with half the prompts.
        num_thread_changes: how often steps went over to another number of CPU threads.
        flops: of products with weights, without attention and head.
        peak_cache_bytes: most memory allocated for segments and rings.
        peak_live_bytes: most of it that the schedule had reserved.
        peak_expanded_bytes: most memory of expanded copies.
        num_weight_bytes_read: of layers that do not fit into memory.
        weight_wait_s: seconds of the phase `extend` that passed waiting for them.
        seconds: by phase: plan, extend, sample, retire.
        seconds_by_threads: of steps, without their plan, by the number of CPU threads.
    """

    num_prompts: int = 0
    num_prompt_tokens: int = 0
    num_tree_tokens: int = 0
    num_computed_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_uncomputed_answer_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_failed_steps: int = 0
    num_thread_changes: int = 0
    flops: float = 0.0
    peak_cache_bytes: int = 0
    peak_live_bytes: int = 0
    peak_expanded_bytes: int = 0
    num_weight_bytes_read: int = 0
    weight_wait_s: float = 0.0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("plan", "extend", "sample", "retire"), 0.0)
    )
    seconds_by_threads: dict[int, float] = field(default_factory=dict[int, float])
