"""Retrieval sets in BEIR layout for the tests: the small one beside them, and public ones;
tests/data/README.md describes each.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

SMALL = "beir_small"


def folder_of(name: str) -> Path:
    """Returns the folder of a set; skips the test if the set is neither in tests/data nor in the
    folder REFINE_FAST_DATA.
    """
    if name == SMALL:
        return Path(__file__).parent / "data" / SMALL
    folder = Path(os.environ.get("REFINE_FAST_DATA") or "absent", name)
    if not folder.is_dir():
        pytest.skip(
            f"needs {name} in BEIR layout in the folder REFINE_FAST_DATA; "
            "tests/data/README.md names its public source"
        )
    return folder


def texts(folder: Path, stem: str) -> dict[str, str]:
    """Returns _id -> text of ``stem``.jsonl or ``stem``.jsonl.gz (stem: corpus or queries)."""
    packed = folder / f"{stem}.jsonl.gz"
    lines = (
        gzip.decompress(packed.read_bytes())
        if packed.is_file()
        else (folder / f"{stem}.jsonl").read_bytes()
    )
    return {row["_id"]: row["text"] for row in map(json.loads, lines.splitlines())}


def pairs(folder: Path, split: str) -> list[tuple[str, str]]:
    """Returns the (query id, passage id) of each line of a split's qrels."""
    rows = [
        line.split("\t")
        for line in (folder / "qrels" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    ]
    return [(query, passage) for query, passage, _ in rows]
