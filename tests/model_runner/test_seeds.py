"""Random numbers of a request: its own, and the same in any run with a seed."""

from dataclasses import replace

import numpy as np

from moebeam.model_runner.seeds import derive_seed, derive_sent_seed
from moebeam.schemas.records import Message, Request, Sampling

HOT = Sampling(9, temperature=1.0)
SEEDED = replace(HOT, seed=7)
ASKED = Request("4", np.array([7, 8], np.int32), (Message("user", "?"),), HOT, scope="s0", row_id="a", run_key="monday")


def test_rows_and_samples_of_one_prompt_draw_apart_with_and_without_a_seed() -> None:
    for sampling in (HOT, SEEDED):
        asked = replace(ASKED, sampling=sampling)
        others = [replace(asked, row_id="b"), replace(asked, sample=1), replace(asked, row_id="a 1")]
        others.append(replace(asked, prompt_token_ids=np.array([7, 9], np.int32)))
        assert len({derive_seed(each) for each in (asked, *others)}) == 5


def test_place_in_a_run_changes_nothing_and_the_seed_does() -> None:
    moved = replace(ASKED, request_id="17", scope="s3", tenant="t")
    assert derive_seed(ASKED) == derive_seed(moved)
    seeded = [derive_seed(replace(ASKED, sampling=replace(HOT, seed=seed))) for seed in (None, 0, 1, -1)]
    assert len({*seeded}) == 4
    assert all(0 <= seed < 2**63 for seed in seeded)


def test_without_a_seed_another_run_draws_anew_and_with_one_it_does_not() -> None:
    for sampling, num_different in ((HOT, 2), (SEEDED, 1)):
        runs = [replace(ASKED, sampling=sampling, run_key=key) for key in ("monday", "tuesday")]
        assert len({derive_seed(each) for each in runs}) == num_different
        assert len({each.own_draws for each in runs}) == num_different


def test_request_that_is_sent_again_unchanged_draws_the_same() -> None:
    assert derive_seed(ASKED) == derive_seed(replace(ASKED, attempt=2))


def test_request_without_a_row_draws_by_its_own_id() -> None:
    bare = replace(ASKED, row_id="")
    assert derive_seed(bare) != derive_seed(replace(bare, request_id="5"))


def test_provider_is_sent_a_seed_of_the_row_that_fits_32_bits_where_one_was_asked_for() -> None:
    assert derive_sent_seed(ASKED) is None
    sent = {derive_sent_seed(replace(ASKED, sampling=SEEDED, sample=sample)) for sample in range(50)}
    assert len(sent) == 50
    assert all(seed is not None and 0 <= seed < 2**31 for seed in sent)
    greedy = replace(ASKED, sampling=replace(SEEDED, temperature=0.0))
    assert derive_sent_seed(greedy) == 7, "it changes nothing"
