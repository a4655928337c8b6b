"""Recall of the retrieval system at the end of a run, in results/serving.csv; resumable.

    REFINE_FAST_DATA=FOLDER python benchmarks/serving.py [--sets squad ...] [--models minilm ...]
        [--dev train synthetic] [--label NAME] [--cache FOLDER] [--again]

Each model on each set, as passage vectors, with sentence vectors, BM25, and their blends. The
weights are chosen on held-out queries: with --dev train, the default, the split "train" of the set
without its test queries; with --dev synthetic, queries that are made from the documents.
Embeddings are kept in --cache. A row that is in the table is not measured again without --again.
gain_recall@3 is the change against the better of passage vectors and BM25, with its paired 95%
interval.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from keyed_table import read, save

from refine_fast.bench.machine import commit, device_name
from refine_fast.pipeline.corpus.beir import RetrievalSet, load_beir
from refine_fast.pipeline.corpus.text import normalize
from refine_fast.pipeline.encoder.encode import encode
from refine_fast.pipeline.encoder.load import encoder_folder, load_encoder
from refine_fast.pipeline.evaluation.significance import gain
from refine_fast.pipeline.serving.blend import Choosing
from refine_fast.pipeline.serving.systems import (
    choose,
    components_of,
    made_set,
    relevant_of,
    score_systems,
)

RESULTS = Path(__file__).parent / "results"
COMMIT = commit()
SETS = ("squad", "covidqa", "dstc11_travel", "scifact", "pubmedqa")
METRICS = ("recall@1", "recall@3", "recall@10", "ndcg@10")
KEY = ("set", "model", "dev", "system", "device")
COLUMNS = (
    *KEY, "dev_queries", "sentences", "lexical", "test_queries", "passages", *METRICS,
    "gain_recall@3", "gain_low", "gain_high", "commit",
)  # fmt: skip
DEV_QUERIES = 1000


class Encoder:
    """An encoder whose embeddings are kept on the disk."""

    def __init__(self, name: str, cache: Path) -> None:
        self.folder, self.cache, self.model = encoder_folder(name), cache, None
        weights = (self.folder / "model.safetensors").read_bytes()
        self.digest = hashlib.sha256(weights).hexdigest()
        cache.mkdir(parents=True, exist_ok=True)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(list(texts), "document")

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(list(texts), "query")

    def _encode(self, texts: list[str], role: Any) -> np.ndarray:
        key = json.dumps([self.digest, role, texts]).encode()
        path = self.cache / f"{hashlib.sha256(key).hexdigest()[:24]}.npy"
        if not path.exists():
            if self.model is None:
                self.model = load_encoder(self.folder)
            encode(self.model, texts, role=role, bf16=False, out=path)
        return np.load(path)


def dev_set(data: RetrievalSet, folder: Path, source: str) -> tuple[RetrievalSet, list[str]]:
    """Held-out queries over the same passages, none of them a test query; and their kinds."""
    if source == "synthetic":
        return made_set(data, DEV_QUERIES)
    train = load_beir(folder, "train")
    tested = {normalize(text) for text in data.queries}
    fresh = [i for i, text in enumerate(train.queries) if normalize(text) not in tested]
    kept = sorted(np.random.default_rng(0).permutation(fresh)[:DEV_QUERIES].tolist())
    columns = (
        [column[i] for i in kept] for column in (train.query_ids, train.queries, train.qrels)
    )
    held = RetrievalSet(train.name, data.doc_ids, data.docs, *columns, data.titles)
    return held, ["user"] * len(kept)


def measure(name: str, set_name: str, dev: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    folder = Path(os.environ["REFINE_FAST_DATA"]) / set_name
    data, encoder = load_beir(folder), Encoder(name, given.cache)
    held, kinds = dev_set(data, folder, dev)
    both = (encoder.documents, encoder.queries)
    choice = choose(Choosing(components_of(held, *both), relevant_of(held)), kinds)
    scores = score_systems(data, components_of(data, *both), choice)
    blends = {
        "sentences": choice.without["lexical"],
        "hybrid": choice.without["sentences"],
        "blend": choice.blend,
    }
    strongest = max(("passages", "BM25"), key=lambda system: scores[system].metrics["recall@3"])
    rows = []
    for system, found in scores.items():
        change = gain(scores[strongest].per_query["recall@3"], found.per_query["recall@3"])
        rows.append(
            {
                "set": set_name,
                "model": given.label or name,
                "dev": dev,
                "system": system,
                "device": device_name(),
                "dev_queries": len(held.queries),
                "sentences": blends[system].sentences if system in blends else "",
                "lexical": blends[system].lexical if system in blends else "",
                "test_queries": len(data.queries),
                "passages": len(data.docs),
                **{metric: round(found.metrics[metric], 4) for metric in METRICS},
                "gain_recall@3": round(change.mean, 4),
                "gain_low": round(change.low, 4),
                "gain_high": round(change.high, 4),
                "commit": COMMIT,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--models", nargs="+", default=["minilm"])
    parser.add_argument("--label", help="what the table calls the model")
    parser.add_argument("--dev", nargs="+", choices=("train", "synthetic"), default=["train"])
    parser.add_argument("--cache", type=Path, default=Path("serving-cache"))
    parser.add_argument("--again", action="store_true", help="also what is in the table")
    given = parser.parse_args()
    table = RESULTS / "serving.csv"
    for set_name in given.sets:
        for name in given.models:
            for dev in given.dev:
                key = (set_name, given.label or name, dev, "blend", device_name())
                if key in read(table, KEY) and not given.again:
                    continue
                rows = measure(name, set_name, dev, given)
                save(table, KEY, COLUMNS, rows)
                for row in rows:
                    print(*(row[c] for c in ("set", "model", "dev", "system", "recall@3")),
                          row["sentences"], row["lexical"],
                          f"[{row['gain_low']}, {row['gain_high']}]", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
