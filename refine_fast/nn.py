"""torch modules over the operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .ops.info_nce import info_nce


class InfoNCELoss(nn.Module):
    """`refine_fast.info_nce` as a module that holds its settings:
    ``InfoNCELoss(temperature=0.02)(q, d)``.

    Args:
        temperature: positive; the start value if ``learnable``.
        learnable: makes the temperature exp of the parameter ``log_temperature``, as in CLIP
            (Radford et al., arXiv 2103.00020, section 2.5). Every call first raises it to CLIP's
            bound of 0.01, or to half of its start if that is lower.
        margin, symmetric, normalize, widths, width_weights, reduction: as for
            `refine_fast.info_nce`, but normalize is on by default.

    Raises:
        ValueError: a temperature that is not positive and finite.
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
            raise ValueError(f"temperature must be a positive number (got {temperature})")
        self.margin, self.symmetric, self.normalize = margin, symmetric, normalize
        self.reduction = reduction
        self.widths, self.width_weights = widths, width_weights
        self.fixed_temperature = None if learnable else temperature
        if learnable:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
            self.lowest = math.log(min(0.01, temperature / 2))

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use."""
        if self.fixed_temperature is None:
            return self.log_temperature.exp()
        return self.fixed_temperature

    def forward(self, q: Tensor, d: Tensor, **inputs: Any) -> Tensor:
        """The loss of queries q (B, D) against documents d (N, D).

        inputs: positives, doc_ids, hard, hard_mask, weight, as for `refine_fast.info_nce`.
        """
        if self.fixed_temperature is None:
            # clamps the parameter itself, as CLIP does: below a clamp of its value the gradient
            # would be 0, and no step would lead back
            with torch.no_grad():
                self.log_temperature.clamp_(min=self.lowest)
        return info_nce(
            q,
            d,
            temperature=self.temperature,
            margin=self.margin,
            symmetric=self.symmetric,
            normalize=self.normalize,
            widths=self.widths,
            width_weights=self.width_weights,
            reduction=self.reduction,
            **inputs,
        )
