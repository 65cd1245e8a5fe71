"""Random numbers of a request: its own, and the same in any run."""

from dataclasses import replace

import numpy as np

from moebeam.model_runner.encoding.answer_text import derive_seed
from moebeam.schemas.records import Message, Request, Sampling

ASKED = Request(
    "4", np.array([7, 8], np.int32), (Message("user", "?"),), Sampling(9, temperature=1.0), scope="s0", row_id="a"
)


def test_rows_of_one_prompt_draw_apart_with_and_without_a_seed() -> None:
    for sampling in (ASKED.sampling, replace(ASKED.sampling, seed=7)):
        asked = replace(ASKED, sampling=sampling)
        assert derive_seed(asked) != derive_seed(replace(asked, row_id="b"))
        assert derive_seed(asked) != derive_seed(replace(asked, prompt_token_ids=np.array([7, 9], np.int32)))


def test_place_in_a_run_changes_nothing_and_the_seed_does() -> None:
    assert derive_seed(ASKED) == derive_seed(replace(ASKED, request_id="17", scope="s3", tenant="t"))
    seeded = [derive_seed(replace(ASKED, sampling=replace(ASKED.sampling, seed=seed))) for seed in (None, 0, 1, -1)]
    assert len({*seeded}) == 4
    assert all(0 <= seed < 2**63 for seed in seeded)


def test_another_attempt_draws_anew() -> None:
    assert derive_seed(ASKED) != derive_seed(replace(ASKED, attempt=2))


def test_request_without_a_row_draws_by_its_own_id() -> None:
    bare = replace(ASKED, row_id="")
    assert derive_seed(bare) != derive_seed(replace(bare, request_id="5"))
