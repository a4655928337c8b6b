"""Peak memory of a fine-tune whose batch is far larger than what the encoder takes at a time:
MiniLM-L6 on SQuAD's (question, passage) pairs, CachedFusedMultipleNegativesRankingLoss in a
SentenceTransformerTrainer with its defaults (AdamW, dropout on).

    REFINE_FAST_DATA=data python benchmarks/bench_train.py [--batch 2048] [--mini-batch 8] [--steps
    2] [--precision bf16]
 peak_mb is the peak resident size of the whole process, with all that Python, torch and
transformers take. Minutes a step on a CPU.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from pathlib import Path

from datasets import Dataset
from record import rows, save
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from refine_fast.integrations.sentence_transformers import CachedFusedMultipleNegativesRankingLoss
from refine_fast.pipeline.corpus.beir import load_beir
from refine_fast.pipeline.encoder.load import encoder_folder


def train(batch: int, mini_batch: int, steps: int, precision: str) -> None:
    squad = load_beir(Path(os.environ["REFINE_FAST_DATA"]) / "squad", "train")
    pairs = [
        (query, squad.docs[row])
        for query, relevant in zip(squad.queries, squad.relevant, strict=True)
        for row in relevant
    ]
    dataset = Dataset.from_dict(
        {"question": [query for query, _ in pairs], "passage": [passage for _, passage in pairs]}
    )
    model = SentenceTransformer(str(encoder_folder("minilm")), device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            dataloader_drop_last=True,
            bf16=precision == "bf16",
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
        )
        loss = CachedFusedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch)
        SentenceTransformerTrainer(model, arguments, dataset, loss=loss).train()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--mini-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    options = parser.parse_args()
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "16")  # as the command line does, and says why
    train(options.batch, options.mini_batch, options.steps, options.precision)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    shape = {"B": options.batch, "mini_batch": options.mini_batch, "steps": options.steps}
    save(
        rows(
            {"refine_fast": [peak]},
            op="info_nce",
            mode="train MiniLM",
            dtype=options.precision,
            shape=shape,
            metric="peak_mb",
            peer="",
        )
    )


if __name__ == "__main__":
    main()
