"""Interpolation of two checkpoints, ``out = base + weight * (tuned - base)``, streamed from file to
file or into a loaded model.

Interpolating a fine-tuned model with the one it came from keeps much of the new skill and most of
the old (WiSE-FT, arXiv 2109.01903; LM-Cocktail, arXiv 2311.13534; REFINE, arXiv 2410.12890,
section 3.4).
"""

from .into import fuse_into
from .merge import fuse, fuse_sweep
from .report import FuseReport, TensorChange

__all__ = ["FuseReport", "TensorChange", "fuse", "fuse_into", "fuse_sweep"]
