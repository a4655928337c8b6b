"""What a fine-tune was planned to take beside what it took: ``refine-fast train --memory BUDGET``
on SQuAD's passages, each in a process of its own, and the ``training_gb`` of ``refine-fast plan``
with the same flags.

    REFINE_FAST_DATA=<folder of BEIR sets> python benchmarks/memory.py [minilm] [bert-base]

peak_mb is the peak resident size of the whole process. bert-base is made on the spot with random
weights: memory depends on shapes alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel

from refine_fast.bench.rows import line, rows, save
from refine_fast.pipeline.encoder.load import encoder_folder

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("REFINE_FAST_DATA", ""))
# encoder -> batch size, budgets: from one that leaves room for few sequences to one where the whole
# batch fits
SETTINGS = {
    "minilm": (64, ("1300MB", "2GB", "4GB", "12GB")),
    "bert-base": (16, ("4GB", "6GB", "12GB")),
}
STEPS = 6


def bert_base(folder: Path) -> Path:
    """BERT-base as its defaults make it, with MiniLM's tokenizer, which is BERT's."""
    tokenizer = SentenceTransformer(str(encoder_folder("minilm"))).tokenizer
    BertModel(BertConfig()).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    words = Transformer(str(folder / "bert"), max_seq_length=256)
    SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension())]).save_pretrained(
        str(folder / "encoder")
    )
    return folder / "encoder"


def measure(name: str, folder: Path) -> None:
    batch, budgets = SETTINGS[name]
    encoder = name if name == "minilm" else str(bert_base(folder))
    common = [
        str(DATA / "squad"),
        "--out",
        str(folder / "run"),
        "--model",
        encoder,
        "--band",
        "auto",
        "--limit",
        "600",
    ]
    common += ["--batch-size", str(batch), "--max-steps", str(STEPS), "--quiet"]
    for precision in ("fp32", "bf16"):
        for budget in budgets:
            arguments = [*common, "--precision", precision, "--memory", budget]
            subprocess.run(["refine-fast", "mine", *arguments], check=True)
            plan = json.loads(
                subprocess.run(
                    ["refine-fast", "plan", *arguments, "--json"], check=True, capture_output=True
                ).stdout
            )
            process = subprocess.Popen(["refine-fast", "train", *arguments])
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(
                    f"{name}: refine-fast ended with status {os.waitstatus_to_exitcode(status)}"
                )
            peaks = {"refine_fast": [usage.ru_maxrss / 1024], "plan": [plan["training_gb"] * 1024]}
            shape = {"B": batch, "mini_batch": plan["mini_batch"], "budget": budget, "steps": STEPS}
            about = {"op": "train", "mode": name, "dtype": precision, "shape": shape}
            found = rows(peaks, metric="peak_mb", peer="plan", **about)
            save(found, RESULTS)
            print(*map(line, found), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoders", nargs="*", choices=[*SETTINGS, []], help="default: all")
    for name in parser.parse_args().encoders or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder))


if __name__ == "__main__":
    main()
