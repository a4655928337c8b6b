"""Adapt an embedding model to your own documents: REFINE (arXiv 2410.12890), with fused kernels for its three costly operations."""

from __future__ import annotations

from ._native import available_isas, force_isa, isa

__version__ = "0.1.0"
__all__ = ["available_isas", "force_isa", "isa"]
