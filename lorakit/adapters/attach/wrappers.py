"""A model without what wraps it: modules that compile, distribute or recompute put names of their own into paths.

An adapter has the same paths, and so the same file, whether the model or a part of it is wrapped or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterError, StorageError

# Class of a wrapper -> name of the module inside it. Names, since importing the classes takes a second.
_INNER = {
    "OptimizedModule": "_orig_mod",  # torch.compile
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",  # of activation checkpointing and offloading
    "DeepSpeedEngine": "module",
}
_DIVIDING = ("FullyShardedDataParallel", "FSDPModule")
_OWN_NAMES = frozenset(_INNER.values()) - {"module"}  # no model has a module of these names


def _inner_name(kind: type) -> str | None:
    return next((_INNER[one.__name__] for one in kind.__mro__ if one.__name__ in _INNER), None)


def is_a(kind: type, name: str) -> bool:
    """Return whether a class, or one of its base classes, has this name."""
    return any(one.__name__ == name for one in kind.__mro__)


def inner_module(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers, or the module itself if it is none."""
    while (name := _inner_name(type(module))) is not None and (inner := module._modules.get(name)) is not None:
        module = inner
    return module


def named_modules(model: nn.Module, without: Collection[nn.Module] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module once with its path, as `model.named_modules()` does, but leave out the wrappers.

    Args:
        without: modules to leave out with everything inside them.
    """
    return _named(model, "", set(without))


def _named(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    module = inner_module(module)
    if module in seen:
        return
    seen.add(module)
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _named(child, f"{path}.{name}" if path else name, seen)


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path without wrappers' names.

    Raises:
        AttributeError: there is no such module.
    """
    module = inner_module(model)
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            raise AttributeError(f"{type(module).__name__} has no module '{name}' (of {path})")
        module = inner_module(child)
    return module


def plain_name(name: str) -> str:
    """Return a tensor's or module's name without the names of wrappers, such as "_orig_mod"."""
    return ".".join(part for part in name.split(".") if part not in _OWN_NAMES)


def put_module(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into its parent, which may be a wrapper."""
    setattr(parent, name, module)
    if is_a(type(parent), "OptimizedModule"):
        parent._initialize()  # type: ignore[operator] # it has bound the forward pass of the old module


def is_peft_model(module: nn.Module) -> bool:
    """Return whether a module is a model of the library PEFT, or one of its tuners."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def check_joins_training(model: nn.Module) -> None:
    """Raise AdapterError if new trained parameters would miss the exchange of gradients between processes.

    DistributedDataParallel and both kinds of FSDP choose the parameters whose gradients they average when they wrap a
    model.
    """
    for path, module in model.named_modules():
        kinds = ("DistributedDataParallel", *_DIVIDING)
        kind = next((kind for kind in kinds if is_a(type(module), kind)), None)
        if kind is not None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            where = f"{path} is" if path else "the model is"
            raise AdapterError(
                f"{where} wrapped by {kind} already, so that the gradients of a new adapter would differ between the "
                "processes: attach the adapter first and wrap the model then, or attach it with trained=False"
            )


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that FSDP has divided among processes as one of its own shape; all processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_into(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter of the same shape, or this process's part of it into its part."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        divided: Any = parameter
        layout = divided.device_mesh, divided.placements
        value = distribute_tensor(value.to(parameter.device), *layout, src_data_rank=None)
    parameter.copy_(value)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[bool]:
    """Within the context, FSDP1's modules hold whole tensors; it yields whether a model is divided among processes."""
    inside: set[nn.Module] = set()
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if is_a(type(module), "FullyShardedDataParallel") and module not in inside:
                whole_within: Any = module.summon_full_params
                stack.enter_context(whole_within(module, writeback=False))
                inside.update(module.modules())  # it gathers these too
        yield is_divided(model)


def check_not_divided(model: nn.Module, problem: str) -> None:
    """Raise AdapterError with a text if a model is divided among processes."""
    if is_divided(model):
        raise AdapterError(f"this model is divided among processes: {problem}")


def is_divided(model: nn.Module) -> bool:
    """Return whether a model's parameters are divided among processes."""
    is_in_parts = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    return is_in_parts or any(is_a(type(module), name) for module in model.modules() for name in _DIVIDING)


def in_first_process(action: Callable[[], None]) -> None:
    """Run an action in the first process alone; the others wait for it, and raise if it fails."""
    problems: list[str | None] = [None]
    try:
        if torch.distributed.get_rank() == 0:
            action()
    except BaseException as error:
        problems = [str(error)]
        raise
    finally:
        torch.distributed.broadcast_object_list(problems)
    if problems[0] is not None:
        raise StorageError(f"the first process failed: {problems[0]}")
