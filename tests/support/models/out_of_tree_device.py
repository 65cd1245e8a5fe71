"""An accelerator that torch does not know: registered from Python, it computes on the CPU and counts what it is asked.

Importing this changes torch for the whole process, so that tests do it in a process of their own. A tensor on the
device holds a CPU tensor; each operator is torch's own on what its arguments hold. A tensor of the device that meets
one of the CPU in an operator is an error here as on real hardware.
"""

from collections import Counter
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "abacus"
NUM_DEVICES = 2

calls: Counter[str] = Counter()
"""Operators that the device was asked for."""

_RESHAPES = ("view.default", "_unsafe_view.default", "_reshape_alias.default")


class _DeviceModule:
    """What torch asks of a backend's module."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return NUM_DEVICES

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


class AbacusTensor(torch.Tensor):
    """A tensor on the device; `held` has its values, and its strides."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    held: torch.Tensor

    @staticmethod
    def of(held: torch.Tensor) -> "AbacusTensor":
        with torch.inference_mode(False):
            made = torch._C._acc.create_empty_tensor(held.shape, held.dtype)
        made.__class__ = AbacusTensor
        made.held = held
        return made


def _on_cpu(value: Any) -> Any:
    if isinstance(value, AbacusTensor):
        return value.held
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def _is_foreign(value: Any) -> bool:
    """Whether an argument is a CPU tensor with dimensions; numbers may mix, as everywhere."""
    return isinstance(value, torch.Tensor) and not isinstance(value, AbacusTensor) and value.ndim > 0


def _run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = str(operator).removeprefix("aten.")
    calls[name] += 1
    leaves = pytree.tree_leaves((args, kwargs))
    if name not in ("_copy_from.default", "_to_copy.default", "copy_.default") and any(map(_is_foreign, leaves)):
        raise RuntimeError(f"{name}: expected all tensors on {NAME}, found some on the CPU")
    ours = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, AbacusTensor)}
    plain_args, plain_kwargs = pytree.tree_map(_on_cpu, (args, kwargs))
    if name == "_copy_from.default":
        plain_args[1].copy_(plain_args[0])
        return args[1]
    # Torch takes the device's tensors for contiguous, whatever the one that is held is.
    compute = torch.Tensor.reshape if name in _RESHAPES else operator
    found = compute(*plain_args, **plain_kwargs)
    target = kwargs.get("device")
    if target is not None and target.type == "cpu":
        return found
    return pytree.tree_map_only(torch.Tensor, lambda made: _first(ours.get(id(made)), made), found)


def _first(known: AbacusTensor | None, made: torch.Tensor) -> AbacusTensor:
    """The tensor itself where an operator changed it in place, else a new one."""
    return AbacusTensor.of(made) if known is None else known


def _register() -> torch.library.Library:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_DeviceModule())
    library = torch.library.Library("aten", "IMPL")
    for whole_name in torch._C._dispatch_get_all_op_names():
        namespace, _, name = whole_name.partition("::")
        base, _, overload = name.partition(".")

        def has(key: str, whole_name: str = whole_name) -> bool:
            return torch._C._dispatch_has_kernel_for_dispatch_key(whole_name, key)

        is_composed = has("CompositeImplicitAutograd") or has("PrivateUse1")
        kernels = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
        is_known = base == "_copy_from" or any(map(has, kernels))
        operator = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if namespace == "aten" and is_known and not is_composed and operator is not None:
            library.impl(name, lambda *args, it=operator, **kwargs: _run(it, args, kwargs), "PrivateUse1")
    return library


library = _register()
