"""The rows of ``benchmarks/results/<device>.csv``: one measured figure each."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

import torch

import refine_fast as rf

from ..errors import RefineFastError
from ..files import atomic
from .machine import commit, device_name, file_name, package_version
from .measuring import percentiles

VALUES = {"p20", "p50", "p80", "ratio_to_peer", "commit", "timestamp"}
"""The columns that are not part of a row's key."""
VERSIONS = {"torch", "triton", "refine_fast"}
METRICS = {
    "seconds": "s",
    "cpu_seconds": "s",
    "peak_mb": "MiB",
    "gflop": "GFLOP",
    "gb": "GB",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
    "fraction_of_roofline": "1",
}


@dataclass(frozen=True)
class Row:
    """One measured figure; the columns of the results file."""

    op: str
    provider: str
    mode: str
    dtype: str
    shape: str
    metric: str
    unit: str
    p20: float
    p50: float
    p80: float
    ratio_to_peer: float | None
    peer: str
    device: str
    isa: str
    threads: int
    torch: str
    triton: str
    refine_fast: str
    commit: str
    timestamp: str

    @property
    def sizes(self) -> dict[str, float]:
        """The shape by name."""
        return json.loads(self.shape)


COLUMNS = [field.name for field in fields(Row)]


@cache
def place() -> dict[str, str]:
    """The columns that all rows of a process share; called before measuring, see ``commit``."""
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "refine_fast": rf.__version__,
        "commit": commit(),
    }


def rows(
    samples: Mapping[str, list[float]],
    *,
    op: str,
    mode: str,
    dtype: str,
    shape: Mapping[str, object],
    metric: str,
    peer: str,
) -> list[Row]:
    """One row a contender: percentiles, and the median's ratio to the median of ``peer``."""
    middle = {name: statistics.median(values) for name, values in samples.items()}
    found = []
    for name, values in samples.items():
        p20, p50, p80 = percentiles(values)
        ratio = middle[name] / middle[peer] if middle.get(peer) else None
        found.append(
            Row(
                op=op,
                provider=name,
                mode=mode,
                dtype=dtype,
                shape=json.dumps(shape, sort_keys=True),
                metric=metric,
                unit=METRICS[metric],
                p20=p20,
                p50=p50,
                p80=p80,
                ratio_to_peer=ratio,
                peer=peer,
                isa=rf.isa(),
                threads=torch.get_num_threads(),
                timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
                **place(),
            )
        )
    return found


def as_text(row: Row) -> dict[str, str]:
    """A row as the file has it."""
    return {
        name: f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
        for name, value in asdict(row).items()
    }


def key(row: Mapping[str, str]) -> tuple[str, ...]:
    """What a later row with the same key overwrites."""
    return tuple(row[name] for name in COLUMNS if name not in VALUES)


def check_folder(folder: Path) -> None:
    """Makes the folder of the results, before anything is measured.

    Raises:
        RefineFastError: if ``save`` would fail there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RefineFastError(
            f"--out: rows cannot be kept in {folder} ({error.strerror}); give another folder."
        ) from None
    if (path := folder / file_name()).exists():
        load(path)


def save(new: Iterable[Row], folder: Path) -> Path:
    """Merges rows into this machine's file in ``folder``, key by key."""
    path = folder / file_name()
    texts = [as_text(row) for row in load(path)] if path.exists() else []
    table = {key(text): text for text in (*texts, *map(as_text, new))}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[k] for k in sorted(table))
    return path


def has_rows(path: Path) -> bool:
    """Whether a file has the columns of rows."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), []) == COLUMNS
    except (UnicodeDecodeError, csv.Error):
        return False


def load(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        RefineFastError: the file is missing or is no such table.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_row(text) for text in csv.DictReader(file)]
    except OSError as error:
        raise RefineFastError(
            f"{path}: {error.strerror}; give a csv file that refine-fast bench wrote."
        ) from None
    except (KeyError, ValueError, AttributeError, csv.Error) as error:
        raise RefineFastError(
            f"{path} is no table of benchmark rows ({type(error).__name__}: {str(error)[:100]}); "
            "give a csv file that refine-fast bench wrote."
        ) from None


def _row(text: Mapping[str, str]) -> Row:
    if None in text or None in text.values():
        raise ValueError("a line has too few or too many columns")
    numbers = {name: float(text[name]) for name in ("p20", "p50", "p80")}
    ratio = float(text["ratio_to_peer"]) if text["ratio_to_peer"] else None
    words = {name: text[name] for name in COLUMNS if name not in numbers}
    json.loads(text["shape"]).items()  # raises for what is no shape
    return Row(
        **words | {"threads": int(text["threads"]), "ratio_to_peer": ratio} | numbers  # type: ignore[arg-type]
    )


def line(row: Row) -> str:
    """A row on one line of a terminal."""
    ratio = "" if row.ratio_to_peer is None else f"  = {row.ratio_to_peer:.3g} x {row.peer}"
    return (
        f"{row.op:10} {row.mode:12} {row.dtype:5} {row.shape:44} {row.provider:32} "
        f"{row.metric:12} {row.p50:10.4g} {row.unit}{ratio}"
    )
