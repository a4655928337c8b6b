"""torch modules over the operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .collectives import gather_rows, ranks, row_counts
from .ops.info_nce import info_nce
from .ops.info_nce_problem import assert_rows, check_reduction


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
        gather: makes the documents of every process of torch.distributed negatives (and, if
            symmetric, its queries). Every input stays local: the process's own rows, ``positives``
            and ``soft_columns`` count in its own d; equal ``doc_ids`` are the same document on
            every process. Hard negatives stay private. The processes may have different numbers
            of rows. The mean over the processes of the result (reduction "mean") is the loss of
            the whole batch, and so DistributedDataParallel's mean of the gradients is its
            gradient. With "sum" and "none" the result covers the process's own rows.

    Raises:
        ValueError: a temperature that is not positive and finite, or another word for reduction.
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
        gather: bool = False,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a positive number (got {temperature})")
        self.margin, self.symmetric, self.normalize = margin, symmetric, normalize
        self.reduction, self.gather = reduction, gather
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

        inputs: positives, doc_ids, hard, hard_mask, weight, soft_columns, soft_targets, as for
        `refine_fast.info_nce`.
        """
        if self.fixed_temperature is None:
            # clamps the parameter itself, as CLIP does: below a clamp of its value the gradient
            # would be 0, and no step would lead back
            with torch.no_grad():
                self.log_temperature.clamp_(min=self.lowest)
        if self.gather and ranks()[1] > 1:
            return self._gathered(q, d, **inputs)
        return self._info_nce(q, d, self.symmetric, self.reduction, **inputs)

    def _info_nce(
        self, q: Tensor, d: Tensor, symmetric: bool, reduction: str, **inputs: Any
    ) -> Tensor:
        return info_nce(
            q,
            d,
            temperature=self.temperature,
            margin=self.margin,
            symmetric=symmetric,
            normalize=self.normalize,
            widths=self.widths,
            width_weights=self.width_weights,
            reduction=reduction,
            **inputs,
        )

    def _gathered(
        self,
        q: Tensor,
        d: Tensor,
        *,
        positives: Tensor | None = None,
        doc_ids: Tensor | None = None,
        soft_columns: Tensor | None = None,
        weight: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The loss of this process's queries against the documents of all of them."""
        rank, size = ranks()
        # before rows of other processes could be taken for those that are missing here
        if positives is None:
            positives = torch.arange(len(q), device=q.device)
            if len(d) < len(q):
                raise ValueError(f"d has {len(d)} rows for {len(q)} queries; give positives")
        elif positives.is_cpu and ((positives < 0) | (positives >= len(d))).any():
            raise ValueError(f"positives must be rows of this process's d, 0 to {len(d) - 1}")
        elif positives.is_cuda:
            assert_rows(positives, len(d))
        counts = row_counts(d)
        start, total = sum(counts[:rank]), sum(counts)
        rows = torch.arange(len(q), device=q.device)
        own = start + positives
        ids = None if doc_ids is None else gather_rows(doc_ids, counts)
        documents = gather_rows(d, counts)
        if soft_columns is not None:
            # rows of d, then the row's hard negatives; -1 is unused
            shift = torch.where(soft_columns < len(d), start, total - len(d))
            soft_columns = torch.where(soft_columns < 0, soft_columns, soft_columns + shift)
        reduction = "none" if self.reduction == "none" else "sum"
        loss = self._info_nce(
            q, documents, False, reduction, positives=own, doc_ids=ids,
            soft_columns=soft_columns, weight=weight, **inputs,
        )  # fmt: skip
        queries_of = row_counts(q)
        if self.symmetric:  # from each row's positive to the queries of all processes
            every = gather_rows(own, queries_of)
            back = self._info_nce(
                documents[own], gather_rows(q, queries_of), False, reduction,
                positives=sum(queries_of[:rank]) + rows,
                doc_ids=every if ids is None else ids[every], weight=weight,
            )  # fmt: skip
            loss = (loss + back) / 2
        if self.reduction != "mean":
            return loss
        weights = q.new_ones(len(q), dtype=loss.dtype) if weight is None else weight.to(loss.dtype)
        divisor = gather_rows(weights, queries_of).sum()
        return loss * size / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
