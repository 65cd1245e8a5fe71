"""Checkpoints whose files hang, grow without end or lie about themselves; each is the embedded one with one change."""

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from benchmarks.hostile_content.case import HostileCase, small_job
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH

Change: TypeAlias = Callable[[Path], None]
"""Makes a folder with a sound checkpoint hostile."""

_DEPTH = 100_000
_BRACKETS = "(" * _DEPTH + "1" + ")" * _DEPTH
_ROWS = [{"id": f"row {row}", "text": f"ticket {row} " + "a" * 500} for row in range(3)]


def _change_config(checkpoint: Path, **values: Any) -> None:
    _change_json(checkpoint / "config.json", lambda document: document.update(values))


def _change_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def _split_by(checkpoint: Path, pattern: str) -> None:
    """A pre-tokenizer with a regular expression of its own."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    _change_json(checkpoint / "tokenizer.json", lambda document: document.update(pre_tokenizer=split))


def _replace_by(checkpoint: Path, pattern: str, content: str) -> None:
    """A normalizer that writes something else for what an expression matches."""
    replaced = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    _change_json(checkpoint / "tokenizer.json", lambda document: document.update(normalizer=replaced))


def _add_tokens(checkpoint: Path, number: int) -> None:
    def add(document: dict[str, Any]) -> None:
        known = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        document["added_tokens"] += [
            {"id": 10_000 + index, "content": f"<token {index}>", **known} for index in range(number)
        ]

    _change_json(checkpoint / "tokenizer.json", add)


def _write(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)


def _enlarge(checkpoint: Path, name: str, num_bytes: int) -> None:
    """A file with a hole in it, which takes no room on the disk."""
    with (checkpoint / name).open("r+b") as file:
        file.truncate(num_bytes)


def _point_at(checkpoint: Path, name: str, target: str) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(target)


def _change_header(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The header of the weights, which is JSON, with the data as it was."""
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])


def _resize_first(header: dict[str, Any], shape: list[int]) -> None:
    header[next(name for name in header if name != "__metadata__")]["shape"] = shape


def _put_in_header(checkpoint: Path, header: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def _write_template(checkpoint: Path, source: str) -> None:
    (checkpoint / "chat_template.jinja").write_text(source)


_SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "a vocabulary of 10^12": {"vocab_size": 10**12},
        "10^9 layers": {"num_hidden_layers": 10**9},
        "a width of 10^9": {"hidden_size": 10**9},
        "10^9 experts": {"n_routed_experts": 10**9},
        "10^9 heads of 10^9": {"num_attention_heads": 10**9, "head_dim": 10**9},
        "a context of 10^15": {"max_position_embeddings": 10**15},
        "a number of 4,000 digits": {"hidden_size": int("9" * 4_000)},
        "layer types without end": {"layer_types": ["sliding_attention"] * 2_000_000},
    }
)
_CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        **{name: partial(_change_config, **values) for name, values in _SIZES.items()},
        "config.json in 100,000 levels": partial(
            _write, name="config.json", content=b'{"a":' * _DEPTH + b"1" + b"}" * _DEPTH
        ),
        "config.json of 8 GB": partial(_enlarge, name="config.json", num_bytes=8 << 30),
        "tokenizer.json of 8 GB": partial(_enlarge, name="tokenizer.json", num_bytes=8 << 30),
        "tokenizer.json is a device": partial(_point_at, name="tokenizer.json", target="/dev/zero"),
        "generation_config.json is a device": partial(_point_at, name="generation_config.json", target="/dev/zero"),
        "tokenizer.json in 100,000 levels": partial(
            _write, name="tokenizer.json", content=b'{"model":' * _DEPTH + b"1" + b"}" * _DEPTH
        ),
        "300,000 added tokens": partial(_add_tokens, number=300_000),
        "a split with repeats in repeats": partial(_split_by, pattern=r"((a+)+)+$|(a|aa)+!"),
        "a split that looks back": partial(_split_by, pattern=r"(?=(a*)*b)(a*)*\2c|(.*)*x"),
        "a split of nested counts": partial(_split_by, pattern=r"((((a{1,500}){1,500}){1,500}){1,500}){1,500}"),
        "a normalizer that grows": partial(_replace_by, pattern="a", content="b" * 1_000_000),
        "weights announce a header of 2^63 bytes": partial(
            _write, name="model.safetensors", content=struct.pack("<Q", 1 << 63) + b"{}"
        ),
        "a header in 100,000 levels": partial(_put_in_header, header=b'{"a":' * _DEPTH + b"1" + b"}" * _DEPTH),
        "a header of a shape that is not there": partial(
            _change_header, change=partial(_resize_first, shape=[10**9, 10**9])
        ),
        "a header of a negative shape": partial(_change_header, change=partial(_resize_first, shape=[-1, -1])),
        "a template that never ends": partial(
            _write_template, source="{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}"
        ),
        "a template of a power of powers": partial(_write_template, source="{{ 9 ** 9 ** 9 }}"),
        "a template of 100,000 levels": partial(_write_template, source="{{ " + _BRACKETS + " }}"),
    }
)
_OF_TEMPLATES = "a template"


def _prepare(folder: Path, name: str) -> AbstractContextManager[Path]:
    checkpoint = folder / "checkpoint"
    shutil.copytree(CHECKPOINT_PATH, checkpoint)
    _CHANGES[name](checkpoint)
    encoding = "chat_template" if name.startswith(_OF_TEMPLATES) else "auto"
    return small_job(folder, _ROWS, model={"engine": "torch", "path": str(checkpoint), "encoding": encoding})


CASES = tuple(HostileCase(name, partial(_prepare, name=name), is_harmless=True) for name in _CHANGES)
