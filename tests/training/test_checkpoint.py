"""The committed checkpoint: loads cleanly, covers the architecture, answers tickets."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV4ForCausalLM, PreTrainedTokenizerFast

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.jobs.demo.tickets import generate_tickets
from training.evaluate import answer_tickets, score_answers
from training.tokenizer import train_tokenizer

pytestmark = pytest.mark.integration

Checkpoint = tuple[DeepseekV4ForCausalLM, PreTrainedTokenizerFast]


def test_weights_fit_the_model_without_missing_or_unexpected_keys() -> None:
    _, info = cast(
        "tuple[object, Mapping[str, object]]",
        AutoModelForCausalLM.from_pretrained(
            CHECKPOINT_PATH, dtype=torch.float32, local_files_only=True, output_loading_info=True
        ),
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_every_kind_of_layer_is_there(checkpoint: Checkpoint) -> None:
    config = checkpoint[0].config
    assert set(config.layer_types or ()) == {
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    }
    assert set(config.mlp_layer_types or ()) == {"hash_moe", "moe"}


def test_weights_are_small_and_bfloat16() -> None:
    weights = CHECKPOINT_PATH / "model.safetensors"
    assert weights.stat().st_size < 9_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16, torch.int64}


def test_hash_routing_sends_each_token_to_distinct_experts(checkpoint: Checkpoint) -> None:
    tables = [table for name, table in checkpoint[0].named_buffers() if name.endswith("tid2eid")]
    assert tables
    for table in tables:  # (vocab_size, num_experts_per_tok)
        assert bool((table[:, 0] != table[:, 1]).all())


def test_training_makes_a_tokenizer_of_the_committed_kind(tmp_path: Path) -> None:
    """The vocabulary itself was made of the wordings of its day; what training would make now may differ in words."""
    train_tokenizer().save_pretrained(tmp_path, save_jinja_files=False)
    made, committed = (json.loads((f / "tokenizer.json").read_text()) for f in (tmp_path, CHECKPOINT_PATH))
    assert made["pre_tokenizer"] == committed["pre_tokenizer"]
    assert made["added_tokens"] == committed["added_tokens"]


def test_held_out_tickets_get_valid_answers(checkpoint: Checkpoint) -> None:
    tickets = generate_tickets(4, seed=13, split="held_out")
    scores = score_answers(tickets, answer_tickets(*checkpoint, tickets), decoding_s=0.0)
    assert scores.finished == scores.schema_valid == 1.0
    assert scores.exact >= 0.5
