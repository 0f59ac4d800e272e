"""How close is close: one table, by dtype.

A rule's error against the float64 step is at most FACTOR times the error of the same step in the same dtype, plus a
floor. Errors are the largest of a tensor, relative to its largest value where that is above one.
The floor is that of the dtype a result was computed in. Tensor cores multiply in the dtype of the inputs, so it is the
inputs' for all that kernels return, their float32 states and gradients too; other backends multiply in the state's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def error(actual: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest true value where that is above one; NaN counts as infinite."""
    if truth.numel() == 0:
        return 0.0
    truth = truth.detach().double()
    difference = (actual.detach().double() - truth).abs().nan_to_num(nan=torch.inf)
    return float(difference.max()) / max(1.0, float(truth.abs().max()))


def assert_close(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Two results of the same work, equal but for rounding in `dtype`."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    wrong = error(actual, expected)
    floor = FLOOR[dtype or actual.dtype]
    assert wrong <= floor, f"{what}: error {wrong:.3g}, allowed {floor:.3g}{where_worst(actual, expected)}"


def assert_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal by every bit that matters."""
    assert torch.equal(actual, expected), f"{what}: not equal bitwise{where_worst(actual, expected)}"


def assert_as_good(actual: Tensor, eager: Tensor, truth: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """The rule of this module: `eager` is the step in the dtype of `actual`, `truth` the step in float64.

    dtype: what `actual` was computed in; None is the dtype of `eager`.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    wrong, allowed = error(actual, truth), FACTOR * error(eager, truth) + FLOOR[dtype or eager.dtype]
    assert wrong <= allowed, f"{what}: error {wrong:.3g}, allowed {allowed:.3g}{where_worst(actual, truth)}"


def assert_all_as_good(
    found: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """`assert_as_good` for all that has a name; all of it was multiplied in `dtype`, whatever it is stored in."""
    for name, x in truth.items():
        assert_as_good(found[name], eager[name].to(dtype), x, name)


def where_worst(actual: Tensor, expected: Tensor) -> str:
    """The index of the largest difference, for a message."""
    if actual.shape != expected.shape or actual.numel() == 0:
        return ""
    actual, expected = actual.detach(), expected.detach()
    difference = (actual.double() - expected.double()).abs().nan_to_num(nan=torch.inf)
    index = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    return f", worst at {list(index)}: {float(actual[index]):.6g} instead of {float(expected[index]):.6g}"
