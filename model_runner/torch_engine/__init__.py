"""Our own engine on torch, for mixture-of-experts models: answers prompts along their prefix tree.

Folders import one way: schedule, weights <- layers <- memory <- models <- engine.
"""

import os

# torch reads this once, with its first tensor: large tensors then lie on huge pages, whose first touch costs a quarter
# (64 MB: 6.7 against 27 ms). No effect if torch is loaded already.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
