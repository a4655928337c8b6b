"""Named sets of options: what a name sets where nothing else is given."""

from __future__ import annotations

from typing import Any

QUICK: dict[str, Any] = {
    "limit": 300,
    "max_steps": 10,
    "batch_size": 16,
    "ood_passages": 300,
    "curve": (0.0, 1.0),
    "weight": 0.35,  # no choice, which so little training would make
    "served": False,
}
"""What --quick sets, unless given otherwise: every stage in about a minute, to see that a set-up
works. Its figures mean little."""

DEMO: dict[str, Any] = {
    "chunk_tokens": 128,
    "batch_size": 32,
    "max_steps": 24,
    "curve": (0.0, 0.5, 1.0),
    "served": False,
}
"""What is set where no documents are given: Python's language reference in a few minutes on two
cores. Training sees half as many tokens of each passage, and 0.8 of an epoch."""

RECIPES: dict[str, dict[str, Any]] = {
    "best": {},
    "paper": {
        "band": (0.5, 0.7),
        "skip": 5,
        "negatives": 1,
        "select": "hardest",
        "batches": "random",
        "distill": 0.0,
        "epochs": 1.0,
        "weight": 0.35,
    },
}
"""Name -> what it sets instead of the defaults: "paper" has the constants of arXiv 2410.12890."""
