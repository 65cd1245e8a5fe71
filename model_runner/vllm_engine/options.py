"""The options of the engine `vllm` in `[model]`."""

from typing import ClassVar

from moebeam.model_runner.checkpoint.model_config import read_model_config
from moebeam.model_runner.checkpoint.weight_files import check_weight_files
from moebeam.schemas.job.model import CheckpointSection


class VllmOptions(CheckpointSection):
    """`engine = "vllm"`: full-size models on NVIDIA and AMD, in an interpreter of vLLM's own."""

    loader: ClassVar[str] = "moebeam.model_runner.vllm_engine.runner:load_vllm_runner"
    is_constrained: ClassVar[bool] = True
    is_self_healing: ClassVar[bool] = True
    unsupported: ClassVar[frozenset[str]] = frozenset({"service_tier"})

    engine: str = "vllm"

    def check_files(self, path: str) -> None:
        """As of `ModelSection`; vLLM has a rope of its own."""
        read_model_config(path, self.max_model_len, checks_rope=False)
        check_weight_files(path, takes_old_files=True)
