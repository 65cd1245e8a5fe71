import pytest

from moebeam.model_runner.openai_engine.response.finish_reasons import is_known_reason, map_finish_reason


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("eos", "stop"),
        ("eos_token", "stop"),
        ("end_turn", "stop"),
        ("STOP", "stop"),
        ("FINISH_REASON_STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("max_output_tokens", "length"),
        ("tool_use", "tool_calls"),
        ("function_call", "tool_calls"),
        ("SAFETY", "content_filter"),
        ("sensitive", "content_filter"),
        ("insufficient_system_resource", "insufficient_system_resource"),
        ("network_error", "aborted"),
        ("error", "aborted"),
    ],
)
def test_words_of_providers_mean_one_of_ours_in_any_case(word: str, expected: str) -> None:
    assert map_finish_reason(word, has_calls=False) == expected
    assert is_known_reason(word)


@pytest.mark.parametrize("word", [None, "", " "])
def test_no_word_is_the_end_of_an_answer(word: str | None) -> None:
    assert map_finish_reason(word, has_calls=False) == "stop"
    assert map_finish_reason(word, has_calls=True) == "tool_calls"
    assert is_known_reason(word)


def test_unknown_word_counts_as_stop_and_is_told_apart() -> None:
    assert map_finish_reason("had_enough", has_calls=False) == "stop"
    assert not is_known_reason("had_enough")
