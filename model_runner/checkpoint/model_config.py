"""A checkpoint's `config.json`: read and checked once for all engines, before a run and at load.

Of the architectures that we run ourselves every value is checked, and what other tools leave null gets its meaning; of
others only the sizes that prompts are held against.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from moebeam.model_runner.checkpoint.config_rules import LATENT, LIMITS, RULES, list_conflicts
from moebeam.model_runner.checkpoint.files import read_json_object
from moebeam.model_runner.checkpoint.rope_settings import derive_context, normalize_rope
from moebeam.model_runner.checkpoint.value_rules import COUNT, NATURAL, Rule, Values, at_least
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.store import storage

CONFIG_NAME = "config.json"
_MAX_FOUND = 80
_MAX_SIZE = (1 << 31) - 1
_MAX_LAYERS = 10_000
_LAYER_KEYS = frozenset(
    {"num_hidden_layers", "num_nextn_predict_layers", "first_k_dense_replace", "n_layers", "n_layer"}
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A configuration that was checked.

    Attributes:
        path: folder of the checkpoint.
        values: of `config.json`, nulls with a meaning filled in and rotary settings in the form of `transformers` 5.
        context_length: most tokens of prompt and answer together.
    """

    path: str
    model_type: str
    values: Mapping[str, Json]
    context_length: int

    @property
    def file(self) -> str:
        return storage.join(self.path, CONFIG_NAME)

    @property
    def is_ours(self) -> bool:
        """Whether it is of an architecture whose every value was checked."""
        return self.model_type in RULES


def read_model_config(path: str, max_model_len: int = 0, *, checks_rope: bool = True) -> ModelConfig:
    """Read and check a checkpoint's configuration; free of torch.

    Args:
        max_model_len: the context that the job asks for; 0 means what the configuration implies.
        checks_rope: False for an engine with a rope of its own, which may do what `transformers` does not.
    Raises:
        EngineLoadError: names the file, the key, what was expected and what was found.
    """
    values = cast("dict[str, Json]", read_json_object(path, CONFIG_NAME))
    file = storage.join(path, CONFIG_NAME)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise refuse_value(file, "model_type", "the name of an architecture", model_type)
    _refuse_absurd_sizes(values, file)
    if model_type not in RULES:
        return ModelConfig(path, model_type, values, find_context_length(values, file, max_model_len))
    values = _fill_nulls(model_type, values)
    context_length = find_context_length(values, file, max_model_len)
    _check_rules(model_type, values, file)
    if checks_rope:
        for key, expected, found in normalize_rope(model_type, values):
            raise refuse_value(file, key, expected, found)
    return ModelConfig(path, model_type, values, context_length)


def check_limits(config: ModelConfig) -> None:
    """Check that the engine `torch` runs a model, of an architecture that it knows.

    Raises:
        EngineLoadError: names the file, the key, what was expected and what was found.
    """
    if not config.is_ours:
        known = " or ".join(sorted(RULES))
        raise refuse_value(config.file, "model_type", f"{known} for engine 'torch'", config.model_type)
    _check_values(LIMITS[config.model_type], config.values, config.file)
    _check_window(config)


def _refuse_absurd_sizes(values: Values, file: str) -> None:
    """Refuse sizes that no model has, before anything is made of them: libraries make a list of layers."""
    for key, value in language_model_values(values).items():
        most = _MAX_LAYERS if key in _LAYER_KEYS else _MAX_SIZE
        if isinstance(value, int) and abs(value) > most:
            raise refuse_value(file, key, f"at most {most:,}", value)


def _check_rules(model_type: str, values: Values, file: str) -> None:
    _check_values(RULES[model_type], values, file)
    for key, expected in list_conflicts(model_type, values):
        raise refuse_value(file, key, expected, values.get(key))


def _check_values(rules: Mapping[str, Rule], values: Values, file: str) -> None:
    for key, rule in rules.items():
        if key in values and not rule.holds(values[key]):
            raise refuse_value(file, key, rule.expected, values[key])


def language_model_values(values: Values) -> Values:
    """The part of a `config.json` that describes the language model: `text_config` where there is one, else all."""
    inner = values.get("text_config")
    return cast("Values", inner) if isinstance(inner, dict) else values


def find_context_length(values: Values, file: str, max_model_len: int = 0) -> int:
    """Most tokens of prompt and answer together: the job's `max_model_len`, else what the configuration implies.

    Args:
        values: a `config.json`.
    Raises:
        EngineLoadError: neither says.
    """
    if max_model_len:
        return max_model_len
    sizes = language_model_values(values)
    stated = sizes.get("max_position_embeddings")
    if not COUNT.holds(stated):
        raise refuse_value(
            file, "max_position_embeddings", f"{COUNT.expected}, or [model] max_model_len in the job", stated
        )
    return derive_context(sizes)


def load_transformers_config(config: ModelConfig) -> Any:
    """The configuration as an object of `transformers`, which takes seconds to import.

    Raises:
        EngineLoadError: `transformers` does not know the architecture, or refuses a value.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        if not config.is_ours:
            return AutoConfig.from_pretrained(config.path, local_files_only=True, trust_remote_code=False)
        loaded: Any = CONFIG_MAPPING[config.model_type].from_dict(dict(config.values))
    except Exception as error:  # its classes check themselves, each with errors of its own
        raise EngineLoadError(
            f"{config.file}: expected the configuration of a model that transformers knows, "
            f"found: {type(error).__name__}: {error}"
        ) from error
    # What the file leaves out has the defaults of `transformers`; they must fit what it says.
    values = {key: getattr(loaded, key) for key in RULES[config.model_type] if hasattr(loaded, key)}
    _check_rules(config.model_type, values, config.file)
    return loaded


def refuse_value(file: str, key: str, expected: str, found: object) -> EngineLoadError:
    """The error of a value that cannot be."""
    written = json.dumps(found, default=str)
    shown = written if len(written) <= _MAX_FOUND else f"{written[:_MAX_FOUND]}…"
    return EngineLoadError(f"{file}: {key}: expected {expected}, found {shown}")


def _fill_nulls(model_type: str, values: dict[str, Json]) -> dict[str, Json]:
    """Give nulls the meaning that other tools give them."""
    heads, hidden_size = values.get("num_attention_heads"), values.get("hidden_size")
    filled = dict(values)
    if filled.get("num_key_value_heads", 0) is None:
        filled["num_key_value_heads"] = heads
    if "n_group" in RULES[model_type]:
        if filled.get("n_shared_experts", 0) is None:
            filled["n_shared_experts"] = 0
        if filled.get("n_group", 0) is None and model_type != "deepseek_v2":
            filled |= {"n_group": 1, "topk_group": 1}
        if filled.get("topk_group", 0) is None and filled.get("n_group") == 1:
            filled["topk_group"] = 1
    if model_type in LATENT:
        # `transformers` derives both, and reads what the file has in their place.
        for key in ("head_dim", "qk_head_dim"):
            filled.pop(key, None)
        if model_type == "glm4_moe_lite" and filled.get("mlp_layer_types") is None:
            _fill_layer_types(filled)
    elif model_type == "gpt_oss" and "head_dim" not in filled:
        pass  # 64, whatever the other sizes are
    elif model_type != "deepseek_v4" and filled.get("head_dim") is None:
        filled.pop("head_dim", None)
        if COUNT.holds(heads) and isinstance(heads, int) and isinstance(hidden_size, int):
            filled["head_dim"] = hidden_size // heads
    return filled


def _fill_layer_types(values: dict[str, Json]) -> None:
    """Let `first_k_dense_replace` count the dense layers: `transformers` has one in any case."""
    num_layers, num_dense = values.get("num_hidden_layers"), values.get("first_k_dense_replace")
    if isinstance(num_layers, int) and isinstance(num_dense, int) and NATURAL.holds(num_dense):
        values["mlp_layer_types"] = ["dense" if index < num_dense else "sparse" for index in range(num_layers)]


def _check_window(config: ModelConfig) -> None:
    """Refuse a sliding window that hides tokens of the context, but of DeepSeek-V4, which has another kind."""
    values = config.values
    window = values.get("sliding_window")
    is_used = config.model_type == "mixtral" or (
        config.model_type == "qwen3_moe" and values.get("use_sliding_window") is True
    )
    if not is_used or window is None:
        return
    if not at_least(config.context_length).holds(window):
        raise refuse_value(
            config.file,
            "sliding_window",
            f"null or at least the context of {config.context_length} tokens, which [model] max_model_len may lower",
            window,
        )
