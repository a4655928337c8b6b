"""Modules over the operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ops.info_nce import info_nce


class InfoNCELoss(nn.Module):
    """`refine_fast.info_nce` with its settings held: ``InfoNCELoss(temperature=0.02)(q, d)``.

    With ``learnable=True`` the temperature is exp of the parameter ``log_temperature``, as in CLIP (Radford et al., arXiv 2103.00020,
    section 2.5), which every call first lifts to CLIP's bound of 0.01 or half of its start, whichever is lower.
    """

    def __init__(
        self,
        temperature: float = 0.02,
        *,
        learnable: bool = False,
        margin: float | None = None,
        symmetric: bool = False,
        normalize: bool = True,
        widths: Sequence[int] | None = None,
        width_weights: Sequence[float] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; it must be a positive number")
        self.margin, self.symmetric, self.normalize, self.reduction = margin, symmetric, normalize, reduction
        self.widths, self.width_weights = widths, width_weights
        self.fixed_temperature = None if learnable else temperature
        if learnable:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
            self.lowest = math.log(min(0.01, temperature / 2))

    @property
    def temperature(self) -> float | Tensor:
        return self.fixed_temperature if self.fixed_temperature is not None else self.log_temperature.exp()

    def forward(self, q: Tensor, d: Tensor, **inputs: Any) -> Tensor:
        """inputs: positives, doc_ids, hard, hard_mask, weight, as for `refine_fast.info_nce`."""
        if self.fixed_temperature is None:
            with torch.no_grad():  # the parameter, as CLIP does: below a clamped value the gradient is 0 and no step leads back
                self.log_temperature.clamp_(min=self.lowest)
        return info_nce(
            q, d, temperature=self.temperature, margin=self.margin, symmetric=self.symmetric, normalize=self.normalize,
            widths=self.widths, width_weights=self.width_weights, reduction=self.reduction, **inputs,
        )  # fmt: skip
