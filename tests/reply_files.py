"""Reads the log of paid replies, as tests of the language model check it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any


def records(store: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read_text().splitlines()]


def accepted(store: Path) -> Counter[str]:
    return Counter(record["chunk"] for record in records(store) if "error" not in record)


def spent(store: Path) -> int:
    return sum(record["calls"] for record in records(store)) if store.exists() else 0
