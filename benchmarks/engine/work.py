"""The work of `benchmarks.engine`: reference checkpoints with random weights, and sets of prompts as token ids.

Equal on every machine: all is drawn from fixed seeds. Weights are drawn wider than a fresh model's, so that greedy
answers differ from prompt to prompt; tables and biases that `transformers` leaves at zero are drawn, too. Between
batches of 1 and of 4 in float32, over 16 prompts of 720 tokens, no expert changed.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

VOCAB_SIZE = 8192
NUM_SPECIAL_TOKENS = 3
"""Ids below are start, end and padding in the reference checkpoints; no prompt holds them."""

NUM_FOREIGN_TOKENS = 4

Layout: TypeAlias = Literal["v3", "v4"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PromptSet: TypeAlias = Literal[
    "shared", "unshared", "unshared_64", "chat", "short_cache", "random_tree", "ten_times", "decode_512", "decode_8192"
]
PROMPT_SETS: tuple[PromptSet, ...] = get_args(PromptSet)

Prompts: TypeAlias = list[list[int]]

_INITIALIZER_RANGE = 0.05
_EMBEDDING_STD = 0.3
_BIAS_STD = 0.1
_ROUTING_BIAS_STD = {"deepseek_v3": 0.02, "deepseek_v4": 0.1}
"""By `model_type`: sigmoid scores lie close together at the top, where 0.1 would leave some experts without a token."""


def reference_config(layout: Layout) -> Any:
    """The configuration of a reference checkpoint: about 120M parameters, 8 layers, 32 experts of which 4 answer."""
    from transformers import DeepseekV3Config, DeepseekV4Config

    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if layout == "v4":
        return DeepseekV4Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=512,
            moe_intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=1,
            head_dim=128,
            n_routed_experts=32,
            num_experts_per_tok=4,
            q_lora_rank=256,
            o_groups=2,
            o_lora_rank=128,
            index_n_heads=4,
            index_head_dim=64,
            index_topk=512,
            initializer_range=_INITIALIZER_RANGE,
            **special,
        )
    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=256,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        n_routed_experts=32,
        n_shared_experts=1,
        num_experts_per_tok=4,
        # A token's fourth and fifth expert can be so close that rounding decides: with less weight on experts than
        # the default of 2.5, that changes an answer less often.
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_mtp_layers=0,
        max_position_embeddings=32_768,
        initializer_range=_INITIALIZER_RANGE,
        **special,
    )


def save_checkpoint(config: Any, folder: Path, *, seed: int = 0) -> int:
    """Draw a model in float32 and write it in Hugging Face form, without a tokenizer; how many parameters it has."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _draw_what_is_zero(model)
    model.save_pretrained(folder)
    if config.model_type == "deepseek_v3":
        _add_vllm_keys(folder / "config.json")
    return sum(parameter.numel() for parameter in model.parameters())


def _draw_what_is_zero(model: Any) -> None:
    """Expert tables, and biases of routing, compression, sinks and stream mixtures; and wider embeddings.

    With embeddings as narrow as the rest, every position ends up with much the same hidden state: answers repeat, and
    a few experts get nearly all tokens.
    """
    import torch

    biases = ("position_bias", "sinks", "_hc.base", "hc_head.hc_base")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                num_experts = model.config.n_routed_experts
                tensor.copy_(torch.rand(tensor.shape[0], num_experts).topk(tensor.shape[1], dim=-1).indices)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, _ROUTING_BIAS_STD[model.config.model_type])
            elif name.endswith(biases):
                tensor.normal_(0.0, _BIAS_STD)
            elif name.endswith("embed_tokens.weight"):
                tensor.normal_(0.0, _EMBEDDING_STD)


def _add_vllm_keys(path: Path) -> None:
    """What vLLM reads and `transformers` takes for granted: without them it would route by softmax, with no bias."""
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}, indent=2) + "\n")


def make_prompts(prompt_set: PromptSet, *, seed: int = 0) -> Prompts:
    """A set of prompts, shuffled.

    `shared`: 128 of 720 tokens, 512 of them shared by all and 192 by four. `unshared`: 32 of 720, `unshared_64`: 96
    of 64. `chat`: 96 that share 400 before 60 of their own. `short_cache`: 64 documents of 768 with 4 questions of 16
    each. `random_tree`: trees of 2 to 9 levels. `ten_times`: 10 of `shared`. `decode_512`, `decode_8192`: 128 that
    share so many tokens before 16 of their own.
    """
    makers: dict[PromptSet, Callable[[random.Random], Prompts]] = {
        "shared": lambda draw: list(_even_tree(draw, [(1, 512), (32, 192), (4, 16)])),
        "unshared": lambda draw: list(_even_tree(draw, [(32, 720)])),
        "unshared_64": lambda draw: list(_even_tree(draw, [(96, 64)])),
        "chat": lambda draw: list(_even_tree(draw, [(1, 400), (96, 60)])),
        "short_cache": lambda draw: list(_even_tree(draw, [(64, 768), (4, 16)])),
        "random_tree": random_tree,
        "ten_times": lambda draw: list(_even_tree(draw, [(10, 512), (32, 192), (4, 16)])),
        "decode_512": lambda draw: list(_even_tree(draw, [(1, 512), (128, 16)])),
        "decode_8192": lambda draw: list(_even_tree(draw, [(1, 8192), (128, 16)])),
    }
    # A generator seeded by text is the same everywhere, unlike one seeded by `hash`.
    draw = random.Random(f"{prompt_set} {seed}")
    prompts = makers[prompt_set](draw)
    draw.shuffle(prompts)
    return prompts


def _even_tree(
    draw: random.Random, levels: Sequence[tuple[int, int]], prefix: Sequence[int] = ()
) -> Iterator[list[int]]:
    """Prompts of a tree whose nodes have, level by level, so many children of so many tokens."""
    if not levels:
        yield list(prefix)
        return
    (num_children, num_tokens), *below = levels
    for _ in range(num_children):
        yield from _even_tree(draw, below, [*prefix, *draw_tokens(draw, num_tokens)])


def random_tree(draw: random.Random, *, num_leaves: int = 24, max_segment: int = 64) -> Prompts:
    """One tree for each depth from 2 to 9, each with so many prompts at its leaves, and some at nodes above.

    Args:
        max_segment: most tokens by which a node is longer than the one above it; at least 1 is drawn.
    """

    def grow(prefix: list[int], depth: int, num_leaves: int) -> Iterator[list[int]]:
        prefix = [*prefix, *draw_tokens(draw, draw.randint(1, max_segment))]
        if depth == 1:
            yield prefix
            return
        if draw.random() < 0.1:
            yield prefix
        num_children = num_leaves if depth == 2 else draw.randint(1, min(3, num_leaves))
        for child in range(num_children):
            share = num_leaves // num_children + (child < num_leaves % num_children)
            yield from grow(prefix, depth - 1, share)

    return [prompt for depth in range(2, 10) for prompt in grow([], depth, num_leaves)]


def foreign_prompts(prompts: Sequence[Sequence[int]], *, vocab_size: int, num_prompts: int = 4) -> Prompts:
    """Prompts to warm up with, as long as the shortest given one, at most 256 tokens.

    None begins with the same `NUM_FOREIGN_TOKENS` as a given one, unless the vocabulary has no others: a prefix cache
    that holds them helps nobody, since caches keep whole blocks of at least 16.
    """
    draw = random.Random("foreign")
    known = {tuple(prompt[:NUM_FOREIGN_TOKENS]) for prompt in prompts}
    num_tokens = min(256, *(len(prompt) for prompt in prompts))
    found: Prompts = []
    for _ in range(num_prompts):
        candidates = (draw_tokens(draw, num_tokens, vocab_size=vocab_size) for _ in range(100))
        last: list[int] = []
        for last in candidates:
            if tuple(last[:NUM_FOREIGN_TOKENS]) not in known:
                break
        found.append(last)
    return found


def draw_tokens(draw: random.Random, num_tokens: int, *, vocab_size: int = VOCAB_SIZE) -> list[int]:
    """Token ids, none of them special."""
    return [draw.randrange(min(NUM_SPECIAL_TOKENS, vocab_size - 1), vocab_size) for _ in range(num_tokens)]


def write_prompts(path: Path, prompts: Sequence[Sequence[int]]) -> None:
    """Write a list of lists of token ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(prompts))


def read_prompts(path: Path) -> Prompts:
    """Read a list of lists of token ids.

    Raises:
        ValueError: it is something else, or a prompt is empty.
    """
    found: object = json.loads(path.read_text())
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path}: expected a list of prompts, found {type(found).__name__} of no prompts")
    for row, prompt in enumerate(cast("list[object]", found)):
        if not isinstance(prompt, list) or not prompt or any(type(token) is not int for token in prompt):
            raise ValueError(f"{path}: expected prompt {row} to be a list of token ids, at least one")
    return cast("Prompts", found)
