"""The arguments of info_nce as one named tuple, and their checks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    """The arguments of the info_nce operators, in the order of their schema.

    The same names and shapes as in `refine_fast.info_nce`; ``temperature`` is a 0-d tensor here,
    and ``widths`` and ``width_weights`` are empty where only the full width counts.
    """

    q: Tensor
    d: Tensor
    temperature: Tensor
    positives: Tensor | None
    doc_ids: Tensor | None
    hard: Tensor | None
    hard_mask: Tensor | None
    margin: float | None
    symmetric: bool
    normalize: bool
    widths: list[int]
    width_weights: list[float]

    def all_widths(self) -> list[int]:
        """The widths, the full one where none is given."""
        return self.widths or [self.q.shape[1]]

    def all_weights(self) -> list[float]:
        """The weight of each of ``all_widths``."""
        return self.width_weights or [1.0]

    def directions(self) -> int:
        """2 if the loss is symmetric, else 1."""
        return 2 if self.symmetric else 1

    def used_hard(self) -> Tensor | None:
        """``hard`` with zeros where it is not used, so that what lies there cannot matter."""
        if self.hard is None or self.hard_mask is None:
            return self.hard
        return self.hard.masked_fill(~self.hard_mask[..., None], 0)

    def of_width(self, width: int) -> dict[str, Any]:
        """The problem of the first ``width`` columns, as the keyword arguments of
        ``reference.info_nce_losses`` and of the Triton kernels."""
        return {
            "q": self.q[:, :width],
            "d": self.d[:, :width],
            "temperature": self.temperature,
            "positives": self.positives,
            "doc_ids": self.doc_ids,
            "hard": None if self.hard is None else self.hard[..., :width],
            "hard_mask": self.hard_mask,
            "margin": self.margin,
            "symmetric": self.symmetric,
            "normalize": self.normalize,
        }


def check_reduction(reduction: str) -> None:
    """Raises ValueError unless ``reduction`` is one of the three words."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none" (got {reduction!r})')


def check_tensors(**arguments: Any) -> None:
    """Raises TypeError for an argument that is neither a tensor nor None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a torch tensor (got {type(value).__name__});"
                f" pass torch.as_tensor({name})"
            )


def check_widths(
    widths: Sequence[int] | None, width_weights: Sequence[float] | None, columns: int
) -> tuple[list[int], list[float]]:
    """Validates the Matryoshka widths of vectors with ``columns`` elements.

    Returns:
        The widths and the weight of each, both empty where ``widths`` is None.

    Raises:
        ValueError: widths that do not ascend to ``columns``, or not one finite weight per width.
        TypeError: a width that is not an integer.
    """
    if widths is None:
        if width_weights is not None:
            raise ValueError("width_weights is given without widths")
        return [], []
    try:
        widths = [index(width) for width in widths]  # also of numpy
    except TypeError:
        raise TypeError(f"widths must be integers (got {widths!r})") from None
    ascending = all(a < b for a, b in itertools.pairwise([0, *widths]))
    if not widths or not ascending or widths[-1] != columns:
        raise ValueError(
            f"widths must ascend from at least 1 to the {columns} columns of q (got {widths})"
        )
    weights = [1.0] * len(widths) if width_weights is None else [float(w) for w in width_weights]
    if len(weights) != len(widths) or not all(-math.inf < w < math.inf for w in weights):
        raise ValueError(
            f"width_weights must hold one finite number for each of the widths {widths}"
            f" (got {weights})"
        )
    return widths, weights


def check(problem: Problem) -> None:
    """Checks shapes, dtypes and devices; reads no values. The kernels and their fakes rely on it.

    Raises:
        ValueError: shapes or devices that do not fit together, or a margin that is NaN.
        TypeError: dtypes that do not fit together.
    """
    q, d = problem.q, problem.d
    if q.ndim != 2 or d.ndim != 2 or q.shape[1] != d.shape[1]:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and d {tuple(d.shape)}; they must be (B, D) and (N, D)"
            " with the same D"
        )
    B, D, N = len(q), q.shape[1], len(d)
    if problem.positives is None and N < B:
        raise ValueError(
            f"d has {N} rows for {B} queries; without positives, row i of d is the positive of"
            " query i"
        )
    hard = problem.hard
    if hard is None and problem.hard_mask is not None:
        raise ValueError("hard_mask is given without hard")
    K = hard.shape[1] if hard is not None and hard.ndim == 3 else 1
    shapes = {
        "temperature": (problem.temperature, ()),
        "positives": (problem.positives, (B,)),
        "doc_ids": (problem.doc_ids, (N,)),
        "hard": (hard, (B, K, D)),
        "hard_mask": (problem.hard_mask, (B, K)),
    }
    for name, (value, shape) in shapes.items():
        if value is None:
            continue
        if value.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; with q {tuple(q.shape)} and"
                f" d {tuple(d.shape)} it must be {shape}"
            )
        if value.device != q.device:
            raise ValueError(f"{name} is on {value.device} and q on {q.device}; use one device")
    if d.device != q.device:
        raise ValueError(f"d is on {d.device} and q on {q.device}; use one device")
    dtypes = {
        "positives": (problem.positives, torch.int64),
        "doc_ids": (problem.doc_ids, torch.int64),
        "hard_mask": (problem.hard_mask, torch.bool),
    }
    for name, (value, dtype) in dtypes.items():
        if value is not None and value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} (got {value.dtype})")
    if not q.is_floating_point():
        raise TypeError(f"q must be a floating-point tensor (got {q.dtype})")
    for name, value in (("d", d), ("hard", hard)):
        if value is not None and value.dtype != q.dtype:
            raise TypeError(
                f"{name} is {value.dtype} and q {q.dtype}; cast one of them, or use torch.autocast"
            )
    if problem.margin is not None and not problem.margin <= math.inf:
        raise ValueError("margin must be a number (got NaN)")


def check_values(problem: Problem) -> None:
    """Checks temperature and positives on the CPU, where reading a value costs nothing.

    Raises:
        ValueError: a temperature or its inverse that is not positive and finite, or a positive
            outside d.
    """
    temperature = problem.temperature
    if not 0 < (1 / temperature).item() < math.inf:
        raise ValueError(
            f"temperature must be a positive number with a finite inverse in {temperature.dtype}"
            f" (got {temperature.item()})"
        )
    if problem.positives is not None and len(problem.positives) > 0:
        low, high = (int(x) for x in problem.positives.aminmax())
        if low < 0 or high >= len(problem.d):
            raise ValueError(
                f"positives must be rows of d, 0 to {len(problem.d) - 1}"
                f" (got {low if low < 0 else high})"
            )


def check_finite(problem: Problem) -> None:
    """As the CPU kernels do: raises ValueError for NaN or infinity in a row that is used."""
    hard = problem.used_hard()
    flat = None if hard is None else hard.flatten(0, 1)
    for name, rows in (("q", problem.q), ("d", problem.d), ("hard.flatten(0, 1)", flat)):
        if rows is not None and not (finite := rows.isfinite().all(1)).all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"info_nce: row {row} of {name} holds NaN or infinity")


def assert_values(problem: Problem) -> None:
    """Asserts on the device that the positives are rows of d, without waiting for the answer.

    A violation fails as an index out of bounds does in torch: a device-side assertion, which a
    later CUDA call reports and which ends the CUDA context. On CPU tensors (Triton's interpreter)
    it is a RuntimeError at once.
    """
    if problem.positives is not None and len(problem.positives) > 0:
        assert_rows(problem.positives, len(problem.d))


def assert_rows(positives: Tensor, count: int) -> None:
    """Asserts, as ``assert_values``, that the positives are rows of a d with ``count`` rows."""
    inside = ((positives >= 0) & (positives < count)).all()
    torch._assert_async(inside, "info_nce: positives must be rows of d, 0 to len(d) - 1")
