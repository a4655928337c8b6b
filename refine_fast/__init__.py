"""Adapts an embedding model to your own documents: REFINE (arXiv 2410.12890), with fused kernels
for its three costly operations.
"""

from __future__ import annotations

from .termination import end_commands_at_once

end_commands_at_once()  # before torch is imported, which takes seconds

from . import nn
from ._native import available_isas, force_isa, isa
from .fuse import FuseReport, fuse, fuse_into, fuse_sweep
from .ops.band_parts import BandPart, BandRule, band_topk_part, merge_band_parts, merge_band_topk
from .ops.band_topk import BandTopK, band_topk
from .ops.best_of_groups import best_of_groups
from .ops.info_nce import info_nce

__version__ = "0.1.0"
__all__ = [
    "BandPart",
    "BandRule",
    "BandTopK",
    "FuseReport",
    "available_isas",
    "band_topk",
    "band_topk_part",
    "best_of_groups",
    "force_isa",
    "fuse",
    "fuse_into",
    "fuse_sweep",
    "info_nce",
    "isa",
    "merge_band_parts",
    "merge_band_topk",
    "nn",
]
