"""The options of the engine `vllm` in `[model]`."""

from typing import ClassVar

from moebeam.schemas.job.model import CheckpointSection


class VllmOptions(CheckpointSection):
    """`engine = "vllm"`: full-size models on NVIDIA and AMD, in an interpreter of vLLM's own."""

    loader: ClassVar[str] = "moebeam.model_runner.vllm_engine.runner:load_vllm_runner"
    is_constrained: ClassVar[bool] = True
    is_self_healing: ClassVar[bool] = True
    unsupported: ClassVar[frozenset[str]] = frozenset({"service_tier"})

    engine: str = "vllm"
