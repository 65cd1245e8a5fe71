"""The weights of a checkpoint: found in its safetensors files, checked, and mapped from disk.

A model asks for each tensor by transformers' name, with the shape that its configuration implies, and finally checks
that nothing was left over. `tensor_names` maps the files' names to those, `quantized` unpacks FP8 and FP4. Nothing is
read before it is touched: a tensor stored in the wanted dtype stays in the page cache, which all processes share.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from pydantic import BaseModel, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moebeam.model_runner.checkpoint.files import read_json_object
from moebeam.model_runner.torch_engine.weights.quantized import (
    FP4_BLOCK,
    FP4_DTYPES,
    FP8_BLOCK,
    QUANTIZED_DTYPES,
    SCALE_DTYPES,
    dequantize,
    infer_unpacked_shape,
    scale_grid,
)
from moebeam.model_runner.torch_engine.weights.tensor_names import RENAMINGS, module_names, scale_name
from moebeam.schemas.errors import EngineLoadError, abbreviate
from moebeam.schemas.store import storage

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_MAX_NAMES_SHOWN = 5
_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
_Part = TypeVar("_Part", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Expert:
    """The three matrices of one routed expert, of one dtype.

    gate, up: shape (expert_width, hidden_size). down: shape (hidden_size, expert_width).
    """

    gate: Tensor
    up: Tensor
    down: Tensor


class _Index(BaseModel):
    """`model.safetensors.index.json`."""

    weight_map: dict[str, str]


class _Quantization(BaseModel):
    """`quantization_config` of `config.json`, as far as stored weights depend on it."""

    quant_method: Literal["fp8"]
    weight_block_size: tuple[PositiveInt, PositiveInt] = FP8_BLOCK


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor is: its name in the file, the file, and the file's mapping."""

    name: str
    file: str
    mapping: safe_open


class CheckpointWeights:
    """Tensors of one checkpoint under transformers' module names, mapped from disk.

    Experts are single matrices (`model.layers.1.mlp.experts.0.gate_proj.weight`) or stacks
    (`model.layers.1.mlp.experts.gate_up_proj`), as the files have them.

    A tensor that `get` or `experts` returned keeps its file mapped while it lives. Writing to it changes neither the
    file nor what other processes see.
    """

    def __init__(
        self, path: str, tensors: Mapping[str, _Stored], dtype: torch.dtype, fp8_block: tuple[int, int]
    ) -> None:
        self._path = path
        self._tensors = tensors
        self._dtype = dtype
        self._fp8_block = fp8_block
        self._used: set[str] = set()

    @classmethod
    def open(cls, path: str, model_type: str, dtype: torch.dtype) -> "CheckpointWeights":
        """Map a checkpoint's files and list their tensors; `model.safetensors` takes precedence over an index.

        Args:
            path: folder of a Hugging Face checkpoint, on a local disk.
            model_type: as in `config.json`; one that `RENAMINGS` knows.
            dtype: of the floating tensors that `get` returns, unless it is asked for another.
        Raises:
            EngineLoadError: the folder is not local, a file is missing or damaged, the index contradicts the files,
                a tensor occurs twice, or the model type or the quantisation method is unknown.
            ValueError: `dtype` is not a floating one.
        """
        if dtype not in _FLOATS:
            raise ValueError(f"dtype: expected one of {_format_dtypes(_FLOATS)}, found {_format_dtypes([dtype])}")
        if model_type not in RENAMINGS:
            raise EngineLoadError(f"{path}: expected a model type of {sorted(RENAMINGS)}, found {model_type!r}")
        if not storage.is_local(path):
            raise EngineLoadError(f"{path}: expected a folder on a local disk, to map its files; copy it to one first")
        fp8_block = _read_fp8_block(path)
        found = list(_map_tensors(path))
        return cls(path, _key_by_module_name(found, model_type), dtype, fp8_block)

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(Path(file).stat().st_size for file in {stored.file for stored in self._tensors.values()})

    def has(self, name: str) -> bool:
        """Whether the files hold a tensor of this name."""
        return name in self._tensors

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Get a tensor: a view of the file if that holds the wanted dtype, else a converted copy.

        Dequantises block-scaled FP8 and packed FP4 matrices. Integers are only ever widened.

        Args:
            name: such as `model.layers.0.self_attn.q_a_proj.weight`.
            shape: what it must have, once FP4 is unpacked.
            dtype: None means the dtype given to `open` for a floating tensor, and the stored one otherwise.
        Raises:
            EngineLoadError: there is no such tensor, it has another shape, its dtype cannot become the wanted one, or
                its scales are missing or misshapen.
        """
        stored = self._read(name, shape)
        scales = self._read_scales(name)
        return self._matrix(name, stored, scales, shape, dtype)

    def experts(self, prefix: str, num_experts: int, hidden_size: int, expert_width: int) -> list[Expert]:
        """Get the routed experts of one layer, in order, whether the files hold stacks or single matrices.

        The stacks are `{prefix}.gate_up_proj` of shape (num_experts, 2 * expert_width, hidden_size), gate first, and
        `{prefix}.down_proj` of shape (num_experts, hidden_size, expert_width). Matrices are views unless they have to
        be converted, which is done expert by expert.

        Args:
            prefix: such as `model.layers.1.mlp.experts`.
        Raises:
            EngineLoadError: as `get`.
        """
        wide, tall = (expert_width, hidden_size), (hidden_size, expert_width)
        if not self.has(f"{prefix}.gate_up_proj") and not self.has(f"{prefix}.down_proj"):
            names = [f"{prefix}.{expert}" for expert in range(num_experts)]
            return [
                Expert(
                    gate=self.get(f"{name}.gate_proj.weight", wide),
                    up=self.get(f"{name}.up_proj.weight", wide),
                    down=self.get(f"{name}.down_proj.weight", tall),
                )
                for name in names
            ]
        gate_up = self._stack(f"{prefix}.gate_up_proj", (num_experts, 2 * expert_width, hidden_size), num_parts=2)
        down = self._stack(f"{prefix}.down_proj", (num_experts, hidden_size, expert_width), num_parts=1)
        return [Expert(gate, up, whole) for (gate, up), (whole,) in zip(gate_up, down, strict=True)]

    def check_all_used(self, ignored: Sequence[str] = ()) -> None:
        """Check that the model used all of the checkpoint.

        Args:
            ignored: regular expressions, searched in transformers' names, of tensors that may stay unused: `^mtp\\.`
                for DeepSeek-V4's layers of multi-token prediction, `^model\\.layers\\.61\\.` for V3's.
        Raises:
            EngineLoadError: the files hold tensors that neither `get` nor `experts` was asked for.
        """
        patterns = [re.compile(pattern) for pattern in ignored]
        unused = [
            self._describe(name)
            for name in self._tensors
            if name not in self._used and not any(pattern.search(name) for pattern in patterns)
        ]
        if unused:
            raise EngineLoadError(
                f"{self._path}: expected only tensors that the model has, found {len(unused)} more: "
                f"{_format_names(unused)}"
            )

    def _stack(self, name: str, shape: tuple[int, int, int], num_parts: int) -> Iterator[list[Tensor]]:
        """Yield the matrices of a stack by expert, each cut into `num_parts` of equal height."""
        stored = self._read(name, shape)
        if infer_unpacked_shape(stored) != shape:
            raise self._shape_error(name, shape, infer_unpacked_shape(stored))
        num_experts, num_rows, num_columns = shape
        scales = self._read_scales(name)
        if scales is not None and (scales.ndim != 3 or scales.shape[0] != num_experts):
            grid = scale_grid((num_rows, num_columns), self._block(stored))
            raise self._shape_error(scale_name(name), (num_experts, *grid), tuple(scales.shape))
        part_rows = num_rows // num_parts
        for expert in range(num_experts):
            matrix, grid = stored[expert], None if scales is None else scales[expert]
            if grid is not None and grid.shape[0] == num_parts * scale_grid((part_rows, 1), self._block(stored))[0]:
                # Blocks restart in each part: transformers merges gate and up, with their scales, from two tensors.
                pairs = zip(matrix.split(part_rows), grid.chunk(num_parts), strict=True)
                yield [self._matrix(name, *pair, (part_rows, num_columns), None) for pair in pairs]
            else:
                whole = self._matrix(name, matrix, grid, (num_rows, num_columns), None)
                yield list(whole.split(part_rows))

    def _matrix(
        self, name: str, stored: Tensor, scales: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None
    ) -> Tensor:
        if scales is None:
            if tuple(stored.shape) != shape:
                raise self._shape_error(name, shape, tuple(stored.shape))
            return self._convert(name, stored, dtype)
        if stored.dtype not in QUANTIZED_DTYPES or scales.dtype not in SCALE_DTYPES:
            raise EngineLoadError(
                f"{self._describe(name)}: expected {_format_dtypes(QUANTIZED_DTYPES)} with scales "
                f"{scale_name(name)!r} in {_format_dtypes(SCALE_DTYPES)}, found {_format_dtypes([stored.dtype])} with "
                f"scales in {_format_dtypes([scales.dtype])}"
            )
        wanted = dtype or self._dtype
        if wanted not in _FLOATS:
            raise self._dtype_error(name, wanted, stored.dtype)
        found = infer_unpacked_shape(stored)
        if len(found) != 2 or found != shape:
            raise self._shape_error(name, shape, found)
        grid = scale_grid((found[0], found[1]), self._block(stored))
        if tuple(scales.shape) != grid:
            raise self._shape_error(scale_name(name), grid, tuple(scales.shape))
        return dequantize(stored, scales, self._block(stored), wanted)

    def _convert(self, name: str, stored: Tensor, dtype: torch.dtype | None) -> Tensor:
        if stored.dtype == torch.float8_e4m3fn:
            raise EngineLoadError(
                f"{self._describe(name)}: expected its scales {scale_name(name)!r} beside a tensor in float8_e4m3fn, "
                f"found none"
            )
        wanted = dtype or (self._dtype if stored.dtype.is_floating_point else stored.dtype)
        if stored.dtype == wanted:
            return stored
        is_rounded = stored.dtype in _FLOATS and wanted in _FLOATS
        is_widened = (
            stored.dtype in _INTEGERS and wanted in _INTEGERS and torch.promote_types(stored.dtype, wanted) == wanted
        )
        if not is_rounded and not is_widened:
            raise self._dtype_error(name, wanted, stored.dtype)
        return stored.to(wanted)

    def _block(self, stored: Tensor) -> tuple[int, int]:
        return FP4_BLOCK if stored.dtype in FP4_DTYPES else self._fp8_block

    def _read_scales(self, name: str) -> Tensor | None:
        return self._read(scale_name(name), ()) if self.has(scale_name(name)) else None

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Get a tensor as stored, mapped, and count it as used."""
        where = self._tensors.get(name)
        if where is None:
            raise EngineLoadError(
                f"{self._path}: expected a tensor {name!r} of shape {shape}, found none; "
                f"{self._describe_neighbours(name)}"
            )
        self._used.add(name)
        try:
            stored = cast("Tensor", where.mapping.get_tensor(where.name))
        except SafetensorError as error:
            raise EngineLoadError(f"{self._describe(name)}: expected a dtype that torch has, found: {error}") from error
        # The format allows any offset, though writers align; torch is not tested on misaligned tensors.
        return stored if stored.data_ptr() % stored.element_size() == 0 else stored.clone()

    def _describe_neighbours(self, name: str) -> str:
        """List the tensors of the closest module that has any, for an error message."""
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            beside = [found for found in self._tensors if found.startswith(f"{parent}.")]
            if beside:
                return f"below {parent!r} there are {_format_names(beside)}"
        return f"there are {_format_names(list(self._tensors))}" if self._tensors else "there are no tensors at all"

    def _describe(self, name: str) -> str:
        where = self._tensors[name]
        alias = "" if where.name == name else f" (stored as {where.name!r})"
        return f"{where.file}: tensor {name!r}{alias}"

    def _shape_error(self, name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> EngineLoadError:
        return EngineLoadError(f"{self._describe(name)}: expected shape {expected}, found {found}")

    def _dtype_error(self, name: str, wanted: torch.dtype, found: torch.dtype) -> EngineLoadError:
        return EngineLoadError(
            f"{self._describe(name)}: expected a dtype that becomes {_format_dtypes([wanted])}, "
            f"found {_format_dtypes([found])}"
        )


def _read_fp8_block(path: str) -> tuple[int, int]:
    """Read how many rows and columns share a scale in a checkpoint's FP8 matrices."""
    found: object = read_json_object(path, "config.json").get("quantization_config")
    if found is None:
        return FP8_BLOCK
    place = f"{storage.join(path, 'config.json')}: quantization_config"
    return _parse_record(_Quantization, found, place).weight_block_size


def _map_tensors(path: str) -> Iterator[_Stored]:
    """Yield every tensor of every file of a checkpoint, under the files' own names."""
    folder = Path(storage.normalize_path(path))
    if (folder / WEIGHTS_NAME).exists():
        yield from _map_file(folder / WEIGHTS_NAME)
        return
    if not (folder / INDEX_NAME).exists():
        raise EngineLoadError(f"{path}: expected a {WEIGHTS_NAME} or a {INDEX_NAME}, found neither")
    index = storage.join(path, INDEX_NAME)
    files = _parse_record(_Index, read_json_object(path, INDEX_NAME), index).weight_map
    missing = sorted(file for file in set(files.values()) if not (folder / file).exists())
    if missing:
        raise EngineLoadError(
            f"{index}: expected the files that it names, found {len(missing)} missing: {_format_names(missing)}"
        )
    holders: dict[str, str] = {}
    for file in sorted(set(files.values())):
        for tensor in _map_file(folder / file):
            if tensor.name in holders:
                raise EngineLoadError(
                    f"{tensor.file}: tensor {tensor.name!r}: expected in one file, found in {holders[tensor.name]} too"
                )
            holders[tensor.name] = file
            yield tensor
    lacking = [f"{name!r} in {file}" for name, file in files.items() if holders.get(name) != file]
    if lacking:
        raise EngineLoadError(
            f"{index}: expected tensors where it says, found {len(lacking)} not there: {_format_names(lacking)}"
        )


def _map_file(file: Path) -> Iterator[_Stored]:
    try:
        mapping = safe_open(file, framework="pt", backend="mmap")
        names = cast("list[str]", mapping.keys())
    except (SafetensorError, OSError) as error:
        raise EngineLoadError(f"{file}: expected a whole safetensors file, found: {error}") from error
    for name in names:
        yield _Stored(name, str(file), mapping)


def _key_by_module_name(found: Sequence[_Stored], model_type: str) -> dict[str, _Stored]:
    names = module_names([tensor.name for tensor in found], RENAMINGS[model_type])
    tensors: dict[str, _Stored] = {}
    for tensor in found:
        name = names[tensor.name]
        if name in tensors:
            raise EngineLoadError(
                f"{tensor.file}: tensor {name!r}: expected once, found stored as {tensors[name].name!r} "
                f"and as {tensor.name!r}"
            )
        tensors[name] = tensor
    return tensors


def _parse_record(kind: type[_Part], value: Any, place: str) -> _Part:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(str(step) for step in first["loc"])
        raise EngineLoadError(f"{place}: {part}: {first['msg']}, found {abbreviate(first['input'])}") from error


def _format_dtypes(dtypes: Sequence[torch.dtype] | frozenset[torch.dtype]) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _format_names(names: Sequence[str]) -> str:
    """Format the first of many names, and how many more there are."""
    rest = len(names) - _MAX_NAMES_SHOWN
    return ", ".join(names[:_MAX_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
