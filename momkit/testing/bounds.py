"""Memory faults made visible: what an interpreted kernel reads and writes must lie in the tensors it was given."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor


def extent(tensor: Tensor) -> tuple[int, int]:
    """Address of a tensor's first byte, and of the one after its last."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def tensors_in(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among a launch's arguments, in tuples or not."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors_in(argument)


def kernel_line() -> str:
    """The line of a kernel that the interpreter is at: the innermost frame that is neither its nor ours."""
    frame = sys._getframe()
    while str(frame.f_globals.get("__name__")).partition(".")[0] == "triton" or frame.f_globals is globals():
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"


def assert_inside(what: str, pointers: Any, mask: Any, extents: list[tuple[int, int]]) -> None:
    """AssertionError if an address that the mask lets through lies in none of the tensors."""
    mask = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    at = pointers.data[mask].astype(np.int64)
    inside = np.zeros(at.shape, bool)
    for begin, end in extents:
        inside |= (at >= begin) & (at + size <= end)
    if not inside.all():
        first = int(at[~inside][0])
        begin, end = min(extents, key=lambda e: max(e[0] - first, first - e[1]), default=(0, 0))
        index, length = (first - begin) // size, (end - begin) // size
        raise AssertionError(
            f"{kernel_line()}: {what} {int((~inside).sum())} of {inside.size} elements outside of all tensors, the "
            f"first one at index {index} of the tensor nearest to it, which has {length}"
        )


@contextmanager
def addresses_checked() -> Iterator[None]:
    """Every load and store of interpreted kernels is checked; one that is out of bounds ends the launch with an error
    that names the line, instead of damage that shows later or not at all."""
    # there once kernels are imported under TRITON_INTERPRET=1
    interpreter = sys.modules["triton.runtime.interpreter"]
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    extents: list[tuple[int, int]] = []
    to_host = executor._init_args_hst

    def noted(*args: Any) -> Any:
        on_host, named_on_host = to_host(*args)
        extents[:] = [extent(tensor) for tensor in tensors_in((*on_host, *named_on_host.values()))]
        return on_host, named_on_host

    def checked(what: str, access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def run(self: Any, pointers: Any, *args: Any, **kwargs: Any) -> Any:
            assert_inside(what, pointers, args[mask_at], extents)
            return access(self, pointers, *args, **kwargs)

        return run

    with (
        mock.patch.object(executor, "_init_args_hst", noted),
        mock.patch.object(builder, "create_masked_load", checked("loads", builder.create_masked_load, 0)),
        mock.patch.object(builder, "create_masked_store", checked("stores", builder.create_masked_store, 1)),
    ):
        yield
