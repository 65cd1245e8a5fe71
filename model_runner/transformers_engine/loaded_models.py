"""What `transformers` loads without a word: weights that it made up, routers of NaN, ropes that remember."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moebeam.model_runner.checkpoint.model_config import load_transformers_config, read_model_config
from moebeam.model_runner.checkpoint.rope_settings import BY_LENGTH
from moebeam.model_runner.checkpoint.weight_files import format_names
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.errors import EngineLoadError

_ROUTING = re.compile(r"(\.gate\.|\.router\.|\.e_score_correction_bias$)")


def check_transformers_checkpoint(config: EngineConfig) -> None:
    """Check that `transformers` can build a checkpoint's model, without its weights.

    Raises:
        EngineLoadError: names the file and what is wrong with it.
    """
    found = read_model_config(config.path, config.options.max_model_len)
    loaded = load_transformers_config(found)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(loaded)
    except Exception as error:  # its models check themselves, each with errors of its own
        raise EngineLoadError(
            f"{found.file}: expected the configuration of a causal language model that transformers builds, "
            f"found: {type(error).__name__}: {error}"
        ) from error


def check_loaded(model: Any, loading: Mapping[str, Any], path: str) -> None:
    """Check that every weight of a model came from its checkpoint, and that its routers hold numbers.

    Args:
        loading: what `from_pretrained` says of the loading.
    Raises:
        EngineLoadError: names the tensors.
    """
    tensors: dict[str, Tensor] = dict(model.state_dict())
    missing = [name for name in cast("Sequence[str]", loading["missing_keys"]) if _is_needed(name, tensors)]
    if missing:
        raise EngineLoadError(
            f"{path}: expected every tensor of the model, found {len(missing)} missing: {format_names(sorted(missing))}"
        )
    for name, tensor in tensors.items():
        if _ROUTING.search(name) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise EngineLoadError(
                f"{path}: tensor {name!r}: expected finite numbers, for it routes rows to experts, found NaN or "
                "infinite ones"
            )


def _is_needed(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor has elements; a block of width 0, as of no shared experts, has none."""
    return name not in tensors or tensors[name].numel() > 0


@dataclass(frozen=True, slots=True)
class RopeByLength:
    """A rotary embedding whose frequencies depend on the longest sequence that it has seen."""

    module: Any

    def reset(self) -> None:
        """Forget the sequences before, so that an answer is the same whatever was asked before it."""
        self.module.max_seq_len_cached = self.module.original_max_seq_len
        self.module.register_buffer("inv_freq", self.module.original_inv_freq.clone(), persistent=False)


def find_ropes_by_length(model: Any) -> list[RopeByLength]:
    """The rotary embeddings of a model whose frequencies depend on the length of a sequence; none for most."""
    return [RopeByLength(module) for module in model.modules() if getattr(module, "rope_type", None) in BY_LENGTH]
