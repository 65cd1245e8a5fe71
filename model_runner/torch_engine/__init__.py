"""Our own engine on torch: models, their weights, and the prefix tree that they run through."""

import os

# Read once, when torch makes its first tensor: large tensors lie on huge pages, whose first touch costs a quarter
# (64 MB: 6.7 against 27 ms). Without effect where torch is loaded already.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
