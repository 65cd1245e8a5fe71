"""Containers: one image for workers, one that starts jobs; both from one lock. `docs/dataflow.md` builds them."""
