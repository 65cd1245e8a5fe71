"""Tensors as a checkpoint's files hold them: found by their headers, mapped from disk, and keyed by module names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moebeam.model_runner.checkpoint.weight_files import StoredTensor
from moebeam.model_runner.torch_engine.weights.tensor_names import RENAMINGS, module_names
from moebeam.schemas.errors import EngineLoadError

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Of the names in safetensors' headers."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file.

    Attributes:
        mapping: of the file; None where only the headers were read.
        content: the tensor, if it was read and not mapped.
    """

    header: StoredTensor
    mapping: safe_open | None = None
    content: Tensor | None = None

    def read(self) -> Tensor:
        """The tensor as stored: mapped, or without contents on the device `meta`.

        Raises:
            SafetensorError, KeyError: torch has no such dtype.
        """
        if self.content is not None:
            return self.content
        if self.mapping is None:
            return torch.empty(self.header.shape, dtype=STORED_DTYPES[self.header.dtype], device="meta")
        return cast("Tensor", self.mapping.get_tensor(self.header.name))


def map_file(file: str) -> safe_open:
    """Map a file.

    Raises:
        EngineLoadError: it is not whole.
    """
    try:
        return safe_open(file, framework="pt", backend="mmap")
    except (SafetensorError, OSError) as error:
        raise EngineLoadError(f"{file}: expected a whole safetensors file, found: {error}") from error


def key_by_module_name(found: Sequence[Stored], model_type: str) -> dict[str, Stored]:
    """Name tensors as `transformers`' modules do.

    Raises:
        EngineLoadError: two have one name.
    """
    names = module_names([tensor.header.name for tensor in found], RENAMINGS[model_type])
    tensors: dict[str, Stored] = {}
    for tensor in found:
        name = names[tensor.header.name]
        if name in tensors:
            raise EngineLoadError(
                f"{tensor.header.file}: tensor {name!r}: expected once, found stored as "
                f"{tensors[name].header.name!r} and as {tensor.header.name!r}"
            )
        tensors[name] = tensor
    return tensors
