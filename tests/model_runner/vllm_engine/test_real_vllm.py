"""The engine over vLLM itself: the interpreter that is named, or one that is installed for the tests."""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moebeam.model_runner.transformers_engine.runner import load_transformers_runner
from moebeam.model_runner.vllm_engine.engine_arguments import ARGUMENTS_VARIABLE
from moebeam.model_runner.vllm_engine.process import PYTHON_VARIABLE
from moebeam.model_runner.vllm_engine.runner import VllmRunner, load_vllm_runner
from moebeam.schemas.errors import EngineFailed
from moebeam.schemas.records import Request, Sampling
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.fake_vllm import by_id, config_of, request
from tests.support.models.checkpoints import save_tiny_tokenizer
from tests.support.servers.vllm_environment import install


def save_tiny_v3_checkpoint(folder: Path, *, seed: int = 0) -> Path:
    """A `deepseek_v3` checkpoint that vLLM for CPU takes: heads 64 wide, the router's words spelled out."""
    tokenizer = save_tiny_tokenizer(folder)
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        DeepseekV3ForCausalLM(config).float().save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(content | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"})  # transformers writes neither
    )
    return folder


@pytest.fixture(scope="module")
def v3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_v3_checkpoint(tmp_path_factory.mktemp("v3"))


@pytest.fixture(scope="module")
def real(v3_checkpoint: Path) -> Iterator[VllmRunner]:
    """vLLM with what its build for CPU needs here; a user's own settings come first."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(PYTHON_VARIABLE, os.environ.get(PYTHON_VARIABLE) or str(install()))
        for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_MLA_DISABLE": "1"}.items():
            environment.setenv(name, os.environ.get(name, value))
        # Compiling takes a minute; without it vLLM 0.32's own CPU kernels answer wrongly for V3, torch's do not.
        quick = '{"enforce_eager": true, "compilation_config": {"custom_ops": ["none"]}}'
        environment.setenv(ARGUMENTS_VARIABLE, os.environ.get(ARGUMENTS_VARIABLE, quick))
        runner = load_vllm_runner(config_of(v3_checkpoint, dtype="float32", batch_size=8))
        yield runner
        runner.close()


def prompts_that_share(num_requests: int, **values: Any) -> list[Request]:
    rng = np.random.default_rng(0)
    shared = rng.integers(5, 261, 260)
    return [
        request(str(i), [*shared[: i % 3 * 130], *rng.integers(5, 261, 5 + i)], tenant=("", "a")[i % 2], **values)
        for i in range(num_requests)
    ]


@pytest.mark.integration
def test_real_vllm_answers_as_transformers_does(real: VllmRunner, v3_checkpoint: Path) -> None:
    oracle = load_transformers_runner(engine_config("transformers", str(v3_checkpoint), dtype="float32", device="cpu"))
    requests = prompts_that_share(24, max_tokens=14)
    expected = {c.request_id: (c.text, c.finish_reason, c.usage.completion_tokens) for c in oracle.generate(requests)}
    stop = expected["3"][0][4:6]
    requests += [
        replace(one, request_id=f"stop{one.request_id}", sampling=Sampling(14, stop=(stop,))) for one in requests
    ]
    expected = {c.request_id: (c.text, c.finish_reason, c.usage.completion_tokens) for c in oracle.generate(requests)}
    found = by_id(real.generate(requests))
    assert {
        name: (c.text, c.finish_reason, c.usage.completion_tokens) for name, c in found.items() if c.error is None
    } == expected
    assert any(cut[1] == "stop" for name, cut in expected.items() if name.startswith("stop"))


@pytest.mark.integration
def test_real_vllm_caches_prefixes_but_never_across_tenants(real: VllmRunner) -> None:
    shared = np.random.default_rng(1).integers(5, 261, 300).tolist()
    first = [request(str(i), [*shared, 70 + i], max_tokens=2, tenant="a") for i in range(3)]
    cached = sorted(completion.usage.cached_tokens or 0 for completion in real.generate(first))
    assert cached[0] == 0
    assert cached[1] > 200
    (other,) = real.generate([replace(first[0], tenant="b")])
    assert other.usage.cached_tokens == 0
    (nobody,) = real.generate([replace(first[0], tenant="")])
    assert nobody.usage.cached_tokens == 0
    (again,) = real.generate([replace(first[0])])
    assert (again.usage.cached_tokens or 0) > 200


@pytest.mark.integration
def test_real_vllm_tells_its_unit_and_hits_what_it_can_reach(real: VllmRunner) -> None:
    unit = real.limits.prefix_unit.num_tokens
    assert unit == real.limits.block_size > 1
    before = real.counters()
    shared = np.random.default_rng(2).integers(5, 261, 2 * unit + 3).tolist()
    for number in range(3):  # one by one, so that nothing is asked before what it could hit is there
        list(real.generate([request(str(number), [*shared, 70 + number], max_tokens=1)]))
    assert real.counters()["num_hit_tokens"] - before["num_hit_tokens"] == 2 * 2 * unit
    assert real.determinism().promise == "tokens"


@pytest.mark.integration
def test_real_vllm_holds_to_grammars_seeds_and_logprobs(real: VllmRunner) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": 0}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    grammar = json.dumps({"grammars": [{"json_schema": schema}]})
    greedy = [replace(one, grammar=grammar) for one in prompts_that_share(6, max_tokens=40)]
    assert {c.text for c in real.generate(greedy)} <= {'{"a":"x"}', '{"a":"y"}'}
    bad = replace(greedy[0], grammar='{"grammars": [{"lark_grammar": "start: missing"}]}')
    (refused,) = real.generate([bad])
    assert isinstance(refused.error, EngineFailed)
    (drawn,) = prompts_that_share(1, max_tokens=6, temperature=1.0, logprobs=True)
    drawn = replace(drawn, row_id="row")  # from which the seed is derived
    twins = [replace(drawn, request_id="twin"), drawn, replace(drawn, request_id="other", sample=1)]
    found = by_id(real.generate(twins))
    assert found["twin"].text == found["0"].text != found["other"].text
    for completion in found.values():
        assert completion.logprobs is not None
        assert len(completion.logprobs) == completion.usage.completion_tokens
        assert max(completion.logprobs) <= 0


@pytest.mark.integration
def test_real_vllm_that_is_killed_is_replaced_and_leaves_nothing_behind(real: VllmRunner) -> None:
    requests = prompts_that_share(12, max_tokens=60)
    completions = real.generate(requests)
    first = next(completions)
    killed = real._supervisor.last.popen.pid
    os.kill(killed, signal.SIGKILL)
    found = by_id(completions) | {first.request_id: first}
    assert len(found) == 12
    assert all(completion.error is None for completion in found.values())
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.killpg(killed, 0)
