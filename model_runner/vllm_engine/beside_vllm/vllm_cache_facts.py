"""What only vLLM's own worker processes know of its prefix cache.

They import this by its plain name: the worker has put this folder on the path that they inherit.
"""

import math
from typing import Any


class CacheFacts:
    """Mixed into vLLM's workers: what only they know of the prefix cache."""

    def moebeam_cache_facts(self) -> list[int]:
        """The tokens between two places where a prefix can be hit, and those computed again after a hit."""
        worker: Any = self
        found = worker.model_runner.kv_cache_config
        specs = [group.kv_cache_spec for group in found.kv_cache_groups]
        kept = [spec for spec in specs if getattr(spec, "prefix_cacheable", True)] or specs
        unit = getattr(worker.vllm_config.cache_config, "cache_hit_alignment_tokens", None)
        unit = unit or getattr(found, "cache_hit_alignment_tokens", None)
        # Versions and platforms that do not tell align hits to what all caches of the model have in common.
        unit = unit or math.lcm(*(int(spec.block_size) for spec in kept))
        return [int(unit), max(int(getattr(spec, "prefix_replay_tokens", 0)) for spec in specs)]
