"""The weights of a checkpoint: found in its safetensors files, checked, and mapped from disk.

A model asks for each tensor by transformers' name, with the shape that its configuration implies, and finally checks
that nothing was left over. `tensor_names` maps the files' names to those, `quantized` unpacks FP8 and FP4. Nothing is
read before it is touched: a tensor stored in the wanted dtype stays in the page cache, which all processes share.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from moebeam.model_runner.checkpoint.weight_files import format_names, list_stored_tensors
from moebeam.model_runner.torch_engine.weights.packed_matrices import Fp4Matrix, GroupedIntegers, Matrix, unpack_matrix
from moebeam.model_runner.torch_engine.weights.quantization_settings import read_fp8_block
from moebeam.model_runner.torch_engine.weights.quantized import (
    FP4_BLOCK,
    FP4_DTYPES,
    QUANTIZED_DTYPES,
    SCALE_DTYPES,
    dequantize,
    fit_scales,
    infer_unpacked_shape,
    scale_grid,
    split_stack_scales,
)
from moebeam.model_runner.torch_engine.weights.stored_tensors import Stored, key_by_module_name, map_file
from moebeam.model_runner.torch_engine.weights.tensor_names import IGNORED, RENAMINGS, scale_name, scale_names
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.store import storage

_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


@dataclass(frozen=True, slots=True)
class Expert:
    """The three matrices of one routed expert.

    gate, up: shape (expert_width, hidden_size). down: shape (hidden_size, expert_width). Biases: one for each output.
    """

    gate: Matrix
    up: Matrix
    down: Matrix
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class CheckpointWeights:
    """Tensors of one checkpoint under transformers' module names, mapped from disk.

    Experts are single matrices (`model.layers.1.mlp.experts.0.gate_proj.weight`) or stacks
    (`model.layers.1.mlp.experts.gate_up_proj`), as the files have them.

    A tensor that `get` or `experts` returned keeps its file mapped while it lives. Writing to it changes neither the
    file nor what other processes see.
    """

    def __init__(
        self, path: str, tensors: Mapping[str, Stored], dtype: torch.dtype, fp8_block: tuple[int, int]
    ) -> None:
        self._path = path
        self._tensors = tensors
        self.dtype = dtype
        self._fp8_block = fp8_block
        self._used: set[str] = set()

    @classmethod
    def open(cls, path: str, model_type: str, dtype: torch.dtype) -> "CheckpointWeights":
        """Map a checkpoint's files and list their tensors.

        Args:
            path: folder of a Hugging Face checkpoint, on a local disk.
            model_type: as in `config.json`; one that `RENAMINGS` knows.
            dtype: of the floating tensors that `get` returns, unless it is asked for another.
        Raises:
            EngineLoadError: the folder is not local, a file is missing or damaged, the index contradicts the files,
                a tensor occurs twice, or the model type or the quantisation method is unknown.
            ValueError: `dtype` is not a floating one.
        """
        if not storage.is_local(path):
            raise EngineLoadError(f"{path}: expected a folder on a local disk, to map its files; copy it to one first")
        path = storage.normalize_path(path)
        headers = list_stored_tensors(path)
        mappings = {file: map_file(file) for file in {header.file for header in headers}}
        return cls._of([Stored(header, mappings[header.file]) for header in headers], path, model_type, dtype)

    @classmethod
    def open_headers(cls, path: str, model_type: str, dtype: torch.dtype) -> "CheckpointWeights":
        """The same from the files' headers alone: its tensors are on the device `meta`, with shapes and no contents.

        Args:
            path: folder of a checkpoint, on disk or in an object store.
        """
        return cls._of([Stored(header, None) for header in list_stored_tensors(path)], path, model_type, dtype)

    @classmethod
    def _of(cls, found: Sequence[Stored], path: str, model_type: str, dtype: torch.dtype) -> "CheckpointWeights":
        if dtype not in _FLOATS:
            raise ValueError(f"dtype: expected one of {_format_dtypes(_FLOATS)}, found {_format_dtypes([dtype])}")
        if model_type not in RENAMINGS:
            raise EngineLoadError(f"{path}: expected a model type of {sorted(RENAMINGS)}, found {model_type!r}")
        return cls(path, key_by_module_name(found, model_type), dtype, read_fp8_block(path))

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """All tensors by their module names."""
        return self._tensors

    @property
    def used_names(self) -> frozenset[str]:
        """What `get` and `experts` were asked for."""
        return frozenset(self._used)

    def mark_used(self, names: Iterable[str]) -> None:
        """Count tensors as used that were read in another way."""
        self._used.update(names)

    @property
    def num_bytes(self) -> int:
        """Bytes of the files."""
        return sum(Path(file).stat().st_size for file in {stored.header.file for stored in self._tensors.values()})

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
        packed = self._unpack(name, shape)
        if packed is not None:
            return packed.dequantize(dtype or self.dtype)
        stored = self._read(name, shape)
        scales = self._read_scales(name)
        return self._matrix(name, stored, scales, shape, dtype)

    def get_matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """Get what rows are multiplied by: whole numbers with scales as they are, anything else as `get` does."""
        packed = self._unpack(name, shape)
        return packed if isinstance(packed, GroupedIntegers) else self.get(name, shape)

    def get_routing(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Get a tensor that decides which experts answer: one NaN in it would make every row's choice arbitrary.

        Raises:
            EngineLoadError: as `get`, or the tensor holds NaN or an infinity.
        """
        tensor = self.get(name, shape, dtype)
        if tensor.device.type != "meta" and not (is_finite := tensor.isfinite()).all():
            num_bad = int((~is_finite).sum())
            raise EngineLoadError(
                f"{self._describe(name)}: expected finite numbers, for it routes rows to experts, found {num_bad} of "
                f"{tensor.numel()} that are NaN or infinite"
            )
        return tensor

    def get_choices(self, name: str, shape: tuple[int, ...], num_experts: int) -> Tensor:
        """Get a table of experts' numbers, int64.

        Raises:
            EngineLoadError: as `get`, or it names an expert that the model does not have.
        """
        table = self.get(name, shape, torch.int64)
        if table.device.type != "meta" and (int(table.min()) < 0 or int(table.max()) >= num_experts):
            raise EngineLoadError(
                f"{self._describe(name)}: expected experts from 0 to {num_experts - 1}, found {int(table.min())} to "
                f"{int(table.max())}"
            )
        return table

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
                    gate=self.get_matrix(f"{name}.gate_proj.weight", wide),
                    up=self.get_matrix(f"{name}.up_proj.weight", wide),
                    down=self.get_matrix(f"{name}.down_proj.weight", tall),
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
        patterns = [re.compile(pattern) for pattern in (*IGNORED, *ignored)]
        unused = [
            self._describe(name)
            for name in self._tensors
            if name not in self._used and not any(pattern.search(name) for pattern in patterns)
        ]
        if unused:
            raise EngineLoadError(
                f"{self._path}: expected only tensors that the model has, found {len(unused)} more: "
                f"{format_names(unused)}"
            )

    def _stack(self, name: str, shape: tuple[int, int, int], num_parts: int) -> Iterator[list[Tensor]]:
        """Yield the matrices of a stack by expert, each cut into `num_parts` of equal height."""
        stored = self._read(name, shape)
        if infer_unpacked_shape(stored) != shape:
            raise self._shape_error(name, shape, infer_unpacked_shape(stored))
        num_experts, num_rows, num_columns = shape
        scales = self._read_scales(name)
        by_expert = None
        if scales is not None:
            by_expert = split_stack_scales(scales, num_experts)
            if by_expert is None:
                grid = scale_grid((num_rows, num_columns), self._block(stored))
                raise self._shape_error(self._scale_name(name), (num_experts, *grid), tuple(scales.shape))
        part_rows = num_rows // num_parts
        for expert in range(num_experts):
            matrix, grid = stored[expert], None if by_expert is None else by_expert[expert]
            num_part_scales = scale_grid((part_rows, 1), self._block(stored))[0]
            if grid is not None and grid.shape[0] in (num_parts * num_part_scales, num_parts) and grid.numel() > 1:
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
                f"{self._scale_name(name)!r} in {_format_dtypes(SCALE_DTYPES)}, found "
                f"{_format_dtypes([stored.dtype])} with scales in {_format_dtypes([scales.dtype])}"
            )
        wanted = dtype or self.dtype
        if wanted not in _FLOATS:
            raise self._dtype_error(name, wanted, stored.dtype)
        found = infer_unpacked_shape(stored)
        if len(found) != 2 or found != shape:
            raise self._shape_error(name, shape, found)
        fitting = fit_scales(scales, (found[0], found[1]), self._block(stored), is_fp8=stored.dtype not in FP4_DTYPES)
        if fitting is None:
            grid = scale_grid((found[0], found[1]), self._block(stored))
            raise self._shape_error(self._scale_name(name), grid, tuple(scales.shape))
        return dequantize(stored, *fitting, wanted)

    def _convert(self, name: str, stored: Tensor, dtype: torch.dtype | None) -> Tensor:
        if stored.dtype == torch.float8_e4m3fn:
            raise EngineLoadError(
                f"{self._describe(name)}: expected its scales {scale_name(name)!r} beside a tensor in float8_e4m3fn, "
                f"found none"
            )
        wanted = dtype or (self.dtype if stored.dtype.is_floating_point else stored.dtype)
        if stored.dtype == wanted:
            return stored
        is_rounded = stored.dtype in _FLOATS and wanted in _FLOATS
        is_widened = (
            stored.dtype in _INTEGERS and wanted in _INTEGERS and torch.promote_types(stored.dtype, wanted) == wanted
        )
        if not is_rounded and not is_widened:
            raise self._dtype_error(name, wanted, stored.dtype)
        return stored.to(wanted)

    def _unpack(self, name: str, shape: tuple[int, ...]) -> GroupedIntegers | Fp4Matrix | None:
        """A matrix that has parts beside its scales, or whole numbers; None for any other tensor."""
        try:
            return unpack_matrix(name, shape, self._tensors, lambda part: self._read(part, ()))
        except ValueError as error:
            part = next(part for part in (f"{name}_packed", name) if self.has(part))
            raise EngineLoadError(f"{self._describe(part)}: {error}") from error

    def _block(self, stored: Tensor) -> tuple[int, int]:
        return FP4_BLOCK if stored.dtype in FP4_DTYPES else self._fp8_block

    def _scale_name(self, name: str) -> str:
        return next((scales for scales in scale_names(name) if self.has(scales)), scale_name(name))

    def _read_scales(self, name: str) -> Tensor | None:
        scales = self._scale_name(name)
        return self._read(scales, ()) if self.has(scales) else None

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
            stored = where.read()
        except (SafetensorError, KeyError) as error:
            raise EngineLoadError(f"{self._describe(name)}: expected a dtype that torch has, found: {error}") from error
        if stored.device.type == "meta":
            return stored
        # The format allows any offset, though writers align; torch is not tested on misaligned tensors.
        return stored if stored.data_ptr() % stored.element_size() == 0 else stored.clone()

    def _describe_neighbours(self, name: str) -> str:
        """List the tensors of the closest module that has any, for an error message."""
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            beside = [found for found in self._tensors if found.startswith(f"{parent}.")]
            if beside:
                return f"below {parent!r} there are {format_names(beside)}"
        return f"there are {format_names(list(self._tensors))}" if self._tensors else "there are no tensors at all"

    def _describe(self, name: str) -> str:
        where = self._tensors[name]
        stored_name = where.header.name
        alias = "" if stored_name == name else f" (stored as {stored_name!r})"
        return f"{where.header.file}: tensor {name!r}{alias}"

    def _shape_error(self, name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> EngineLoadError:
        return EngineLoadError(f"{self._describe(name)}: expected shape {expected}, found {found}")

    def _dtype_error(self, name: str, wanted: torch.dtype, found: torch.dtype) -> EngineLoadError:
        return EngineLoadError(
            f"{self._describe(name)}: expected a dtype that becomes {_format_dtypes([wanted])}, "
            f"found {_format_dtypes([found])}"
        )


def _format_dtypes(dtypes: Sequence[torch.dtype] | frozenset[torch.dtype]) -> str:
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
