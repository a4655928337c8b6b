"""NanoBEIR by name: 13 sets of BEIR cut to 50 queries each, fetched from Hugging Face once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import RefineFastError
from ..cache import cache_folder, made_once

PREFIX = "nanobeir"
"""Name of all sets; "nanobeir/scifact" is one of them."""

DATASET = "sentence-transformers/NanoBEIR-en"
"""Its configurations are corpus, queries and qrels, with a split for each set."""

SPLITS = {
    "arguana": "NanoArguAna",
    "climatefever": "NanoClimateFEVER",
    "dbpedia": "NanoDBPedia",
    "fever": "NanoFEVER",
    "fiqa2018": "NanoFiQA2018",
    "hotpotqa": "NanoHotpotQA",
    "msmarco": "NanoMSMARCO",
    "nfcorpus": "NanoNFCorpus",
    "nq": "NanoNQ",
    "quoraretrieval": "NanoQuoraRetrieval",
    "scidocs": "NanoSCIDOCS",
    "scifact": "NanoSciFact",
    "touche2020": "NanoTouche2020",
}


def is_nanobeir(name: str, beside: Path) -> bool:
    """Whether a name stands for sets of NanoBEIR: no folder ``beside`` has it."""
    return name.partition("/")[0] == PREFIX and not (beside / name).exists()


def sets_of(name: str) -> list[str]:
    """The sets that a name stands for: every one for "nanobeir", one for "nanobeir/scifact".

    Raises:
        ValueError: if the name after "nanobeir/" is not one of ``SPLITS``.
    """
    one = name.partition("/")[2]
    if not one:
        return [f"{PREFIX}/{known}" for known in SPLITS]
    if one not in SPLITS:
        raise ValueError(f"must name one of {', '.join(SPLITS)} after {PREFIX}/")
    return [name]


def folder_name(name: str) -> str:
    """Of the folder of a set, by which reports name it."""
    return name.replace("/", "-")


def nanobeir_folder(name: str) -> Path:
    """A set of NanoBEIR in BEIR layout, fetched into the cache if it is not there yet.

    Args:
        name: such as "nanobeir/scifact".

    Raises:
        RefineFastError: if it is not in the cache and cannot be fetched.
    """
    folder = cache_folder() / folder_name(name)
    if not folder.is_dir():
        with made_once(folder) as temporary:
            try:
                _fetch(SPLITS[name.partition("/")[2]], temporary)
            except Exception as error:  # of four libraries, whatever the network does
                reason = " ".join(str(error).split())[:200]
                raise RefineFastError(
                    f"ood: {name} is not in {folder.parent} and cannot be fetched from Hugging Face"
                    f" ({reason}); connect to it once, or give a BEIR folder."
                ) from error
    return folder


def _fetch(split: str, folder: Path) -> None:
    from datasets import load_dataset

    corpus, queries, qrels = (
        load_dataset(DATASET, part, split=split) for part in ("corpus", "queries", "qrels")
    )
    _write_records(folder / "corpus.jsonl", corpus)
    _write_records(folder / "queries.jsonl", queries)
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [f"{row['query-id']}\t{row['corpus-id']}\t{row.get('score', 1)}" for row in qrels]
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_records(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            record = {"_id": row["_id"], "title": row.get("title") or "", "text": row["text"]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
