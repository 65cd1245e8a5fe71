"""The options of the engine `transformers` in `[model]`."""

from typing import ClassVar

from moebeam.model_runner.checkpoint.model_config import read_model_config
from moebeam.model_runner.checkpoint.weight_files import check_weight_files, refuse_overlaid_file
from moebeam.schemas.job.model import CheckpointSection


class TransformersOptions(CheckpointSection):
    """`engine = "transformers"`: any Hugging Face causal LM; slow and simple."""

    loader: ClassVar[str] = "moebeam.model_runner.transformers_engine.runner:load_transformers_runner"
    checker: ClassVar[str] = "moebeam.model_runner.transformers_engine.loaded_models:check_transformers_checkpoint"
    extra: ClassVar[str] = "torch"
    is_constrained: ClassVar[bool] = True
    unsupported: ClassVar[frozenset[str]] = frozenset({"service_tier", "logprobs", "top_logprobs"})

    engine: str = "transformers"

    def check_files(self, path: str) -> None:
        """As of `ModelSection`."""
        read_model_config(path, self.max_model_len)
        check_weight_files(path, takes_old_files=True)
        refuse_overlaid_file(path)
