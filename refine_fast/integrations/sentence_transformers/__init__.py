"""Drop-in replacements for sentence-transformers. Names are loaded on first use; the library itself
is not imported before.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_SUBMODULE = {
    "CachedFusedMultipleNegativesRankingLoss": "losses",
    "FusedMultipleNegativesRankingLoss": "losses",
    "TwinEncoder": "twin",
    "merge": "merging",
    "mine_hard_negatives": "mining",
}
__all__ = sorted(_SUBMODULE)


def __getattr__(name: str) -> Any:
    if name not in _SUBMODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_SUBMODULE[name]}", __name__), name)
