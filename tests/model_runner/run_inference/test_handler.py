"""Engines behind Beam's `RunInference`."""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from moebeam.model_runner.fake_engine.runner import load_fake_runner
from moebeam.model_runner.run_inference.handler import LoadedEngine, MoebeamModelHandler
from moebeam.schemas.errors import EngineContractError
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config

CONFIG = engine_config(engine="fake", path="", name="model", revision="r")


def request(request_id: str, num_tokens: int) -> Request:
    return Request(request_id, np.arange(num_tokens, dtype=np.int32), (Message("user", "häh"),), Sampling(64))


class Backwards:
    """An engine that answers in reverse order."""

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        return reversed(list(load_fake_runner(CONFIG).generate(requests)))


class Forgetful:
    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        return iter(list(load_fake_runner(CONFIG).generate(requests))[1:])


class Repeating:
    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for completion in load_fake_runner(CONFIG).generate(requests):
            yield completion
            yield completion


def num_prompt_tokens(completion: Completion) -> int:
    return completion.usage.prompt_tokens


def test_input_order_is_restored_even_when_ids_collide() -> None:
    requests = [request("same", 3), request("same", 1), request("other", 2)]
    completions = LoadedEngine(Backwards()).answer(requests)
    assert [(c.request_id, num_prompt_tokens(c)) for c in completions] == [("same", 3), ("same", 1), ("other", 2)]


def test_engine_that_breaks_its_contract_is_an_error() -> None:
    for engine in (Forgetful(), Repeating()):
        with pytest.raises(EngineContractError):
            LoadedEngine(engine).answer([request("a", 1), request("b", 2)])


def test_handler_hands_out_lists_and_a_model_that_can_be_weakly_referenced() -> None:
    handler = MoebeamModelHandler(CONFIG)
    model = handler.load_model()
    assert weakref.ref(model)() is model
    found = handler.run_inference([request("a", 1)], model)
    assert isinstance(found, list)
    assert handler.run_inference([], model) == []


def test_batching_and_sharing_are_as_asked() -> None:
    assert MoebeamModelHandler(CONFIG).batch_elements_kwargs() == {"min_batch_size": 1, "max_batch_size": 256}
    handler = MoebeamModelHandler(CONFIG, min_batch_size=2, max_batch_size=3, share_across_processes=True)
    assert handler.batch_elements_kwargs() == {"min_batch_size": 2, "max_batch_size": 3}
    assert handler.share_model_across_processes()
    assert not MoebeamModelHandler(CONFIG).share_model_across_processes()


def test_inference_arguments_are_refused() -> None:
    handler = MoebeamModelHandler(CONFIG)
    handler.validate_inference_args(None)
    with pytest.raises(ValueError, match=r"temperature.*Request\.sampling"):
        handler.validate_inference_args({"temperature": 1})


def test_size_of_a_batch_is_its_token_ids_and_texts() -> None:
    handler = MoebeamModelHandler(CONFIG)
    assert handler.get_num_bytes([request("a", 5), request("b", 1)]) == 6 * 4 + 2 * 4
    assert handler.get_metrics_namespace() == "moebeam"


@pytest.mark.parametrize("is_keyed", [False, True])
def test_run_inference_keeps_answers_with_their_rows(is_keyed: bool) -> None:
    requests = [request(f"r{n}", n) for n in range(1, 40)]
    handler = MoebeamModelHandler(CONFIG, min_batch_size=5)
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        if is_keyed:
            rows = pipeline | beam.Create([(n, replace(r, request_id="same")) for n, r in enumerate(requests, 1)])
            answers = rows | RunInference(KeyedModelHandler(handler)) | beam.MapTuple(_key_and_length)
            expected = [(n, n) for n in range(1, 40)]
        else:
            rows = pipeline | beam.Create(requests)
            answers = rows | RunInference(handler) | beam.Map(_id_and_length)
            expected = [(f"r{n}", n) for n in range(1, 40)]
        assert_that(answers, equal_to(expected))


def _key_and_length(key: int, completion: Completion) -> tuple[int, int]:
    return key, completion.usage.prompt_tokens


def _id_and_length(completion: Completion) -> tuple[str, int]:
    return completion.request_id, completion.usage.prompt_tokens
