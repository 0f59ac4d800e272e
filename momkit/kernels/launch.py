"""Launching kernels with little work for the host, and compiling side by side those that a call is missing.

A kernel takes tensors, None, or tuples of these, then integers and floats that are not specialised, then constants.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import ContextVar, copy_context
from functools import wraps
from threading import RLock
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_compiled: dict[Any, Any] = {}
_compiling = RLock()
# what `launch` does with a kernel that is not compiled: compile and run it, leave the body, or compile and run nothing
_missing: ContextVar[Literal["run", "leave", "compile"]] = ContextVar("missing", default="run")


class KernelMissing(Exception):
    """A body needs a kernel that is not compiled."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def kind(argument: Any) -> Any:
    """All that Triton compiles a kernel anew for, of a tensor, None, or a tuple of these."""
    if isinstance(argument, tuple):
        return tuple(map(kind, argument))
    return argument if argument is None else (argument.dtype, argument.data_ptr() % 16 == 0)


def launch(
    kernel: Any, programs: int, tensors: tuple[Tensor | tuple[Tensor | None, ...] | None, ...],
    scalars: tuple[int | float, ...], *constants: Any, num_warps: int = 4, num_stages: int = 3,
) -> None:  # fmt: skip
    """Run `programs` programs of a kernel on the tensors' device; nothing where there are none.

    One of the tensors at least is in no tuple.
    """
    if not programs:
        return
    device = next(tensor.device for tensor in tensors if tensor is not None and not isinstance(tensor, tuple))
    arguments = (*tensors, *scalars, *constants)
    if device.type != "cuda":
        kernel[(programs,)](*arguments)
        return
    key = (kernel, device.index, kind(tensors), constants, num_warps, num_stages)
    compiled = _compiled.get(key)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
        if compiled is not None and _missing.get() != "compile":
            compiled[(programs, 1, 1)](*arguments)
        elif compiled is None and _missing.get() == "leave":
            raise KernelMissing
        elif compiled is None and _missing.get() == "compile":
            kernel.warmup(*arguments, grid=(programs,), **options)
        elif compiled is None:
            # while another thread compiles, Triton hands out what is not a kernel yet
            with _compiling:
                _compiled[key] = kernel[(programs,)](*arguments, **options)


def compiled_together(body: Callable[P, R]) -> Callable[P, R]:
    """Have a body that launches kernels, and may be run twice, first compile all that it is missing, side by side."""

    @wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return missing("leave", body, *args, **kwargs)
        except KernelMissing:
            with _compiling:
                # in a context of its own: the mode does not leave it if a kernel does not compile
                copy_context().run(compile_missing, body, *args, **kwargs)
        return body(*args, **kwargs)

    return run


def compile_missing(body: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> None:
    """Compile all kernels that a body is missing, and run none."""
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        missing("compile", body, *args, **kwargs)


def missing(what: Literal["leave", "compile"], body: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a body under a rule for kernels that are not compiled."""
    token = _missing.set(what)
    try:
        return body(*args, **kwargs)
    finally:
        _missing.reset(token)
