"""Path of the embedded default checkpoint; free of torch, to keep the command line fast."""

from pathlib import Path

CHECKPOINT_PATH = Path(__file__).parents[1] / "demo" / "checkpoint"
