"""What small language models need: plain lines instead of JSON, and a worked example."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from .languages import PASSAGE_LIKELY, identify

SMALL = 2e9
"""Models with fewer parameters write JSON rarely, and lose the passage in a long instruction."""

TOKENS_PER_LINE = 28
"""Longest question, in tokens."""

_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", re.IGNORECASE)


def is_small(model: str) -> bool:
    """Whether a model has fewer than ``SMALL`` parameters.

    Args:
        model: a folder, whose weights are counted, or a name such as "qwen2.5:0.5b", which says
            it. A model that says nothing is not small.
    """
    folder = Path(model)
    if folder.is_dir():
        counts = [_parameters(file) for file in folder.glob("*.safetensors")]
        return bool(counts) and sum(counts) < SMALL
    size = _SIZE.search(model)
    return size is not None and float(size[1]) * {"m": 1e6, "b": 1e9}[size[2].lower()] < SMALL


def _parameters(file: Path) -> int:
    """The number of weights in a safetensors file, from its header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if "shape" in entry)


def example_for(passage: str) -> Mapping[str, Any]:
    """The worked example in the passage's language; English where there is none.

    Returns:
        "ask" (the instruction), "title", "passage", "questions", and "starts", the words with which
        questions begin in this language (empty: any).
    """
    examples = _examples()
    language, probability = identify(passage)[0]
    if probability >= PASSAGE_LIKELY and language in examples:
        return examples[language]
    # Without a list for its language, a question may begin with any word.
    return examples["en"] | ({} if language == "en" else {"starts": []})


@cache
def _examples() -> dict[str, Any]:
    source = resources.files(__package__) / "examples.json"
    return dict(json.loads(source.read_text(encoding="utf-8")))
