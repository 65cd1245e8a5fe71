"""Random numbers of a request: its row's own, whatever engine, process, shard or batch answers it.

In-process engines draw each token by this seed and the token's position; a provider is sent a short form of it.
"""

import hashlib

from moebeam.schemas.records import Request

_NUM_SENT_BITS = 31
"""Providers take seeds of 32 bits with a sign, if not longer ones."""


def derive_seed(request: Request) -> int:
    """A hash of what makes a request's random numbers its own: seed, or else run; row, sample and prompt.

    Rows draw apart from each other, also those of one prompt or of a job with one seed, and each sample of a row. A
    request that is sent again unchanged draws the same; one that asks for a repair has another prompt, so draws anew.

    Returns:
        At least 0, below 2**63.
    """
    row_id = (request.row_id or request.request_id).encode("utf-8", "surrogatepass")
    seed = request.sampling.seed
    source = f"run {request.run_key}" if seed is None else f"seed {seed}"
    digest = hashlib.sha256(f"{source} {request.sample} {len(row_id)} ".encode() + row_id)
    digest.update(request.prompt_token_ids.astype("<i4").tobytes())
    return int.from_bytes(digest.digest()[:8], "little") % 2**63


def derive_sent_seed(request: Request) -> int | None:
    """The seed that a provider is sent: the row's and the sample's own, or None without a seed.

    A greedy request keeps the seed that was asked for: it changes nothing.
    """
    sampling = request.sampling
    if sampling.seed is None or sampling.is_greedy:
        return sampling.seed
    return derive_seed(request) % 2**_NUM_SENT_BITS
