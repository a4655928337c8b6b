"""The texts of a batch in mini-batches of similar lengths, so that little is spent on padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.gradcache import _create_minibatch
from torch import Tensor


def longest(sides: Sequence[dict[str, Any]]) -> int:
    """Tokens of the longest text."""
    return max((int(_widths(side).max()) for side in sides if _has_rows(side)), default=1)


def cut(side: dict[str, Any], tokens: int | None) -> tuple[list[dict[str, Any]], Tensor | slice]:
    """Mini-batches of at most ``tokens`` tokens, padding included, the longest texts first.

    Args:
        side: what the encoder reads of n texts.
        tokens: at least those of the longest text; None: all texts in one.

    Returns:
        The mini-batches, and the place of each of the n texts among their rows.
    """
    if tokens is None or not _has_rows(side):
        return [side], slice(None)
    widths, order = _widths(side).sort(descending=True, stable=True)
    n = len(order)
    ordered = {
        name: x[order] if isinstance(x, Tensor) and x.ndim and len(x) == n else x
        for name, x in side.items()
    }
    parts, start = [], 0
    while start < n:
        end = start + tokens // int(widths[start])
        parts.append(_create_minibatch(ordered, start, end))
        start = end
    return parts, order.argsort()


def _has_rows(side: dict[str, Any]) -> bool:
    """Whether each text has a row of its own, which a list of tokens for all does not have."""
    return "attention_mask" in side and side["attention_mask"].ndim == 2


def _widths(side: dict[str, Any]) -> Tensor:
    """The columns that each text takes, up to its last token, (n,) int64."""
    mask = side["attention_mask"]
    return ((mask != 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).clamp(1)
