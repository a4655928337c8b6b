"""What the files in a model's folder are for."""

from __future__ import annotations

from pathlib import Path


def of_the_model(file: Path) -> bool:
    """Whether a file may bear on what the model computes. A model card may not: a hub's changes
    more often than the model, and a run's whenever other sets are scored."""
    return file.suffix.lower() not in (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf")
