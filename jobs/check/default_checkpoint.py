"""Where the embedded default checkpoint lies; free of torch, so that a command line can name it cheaply."""

from pathlib import Path

CHECKPOINT_PATH = Path(__file__).with_name("checkpoint")
