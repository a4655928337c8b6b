"""Whole runs over encoders that are not the usual one: what the report says is what the product
does."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import ENCODERS
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from refine_fast.cli import main
from refine_fast.pipeline import RunConfig, run
from refine_fast.pipeline.artifacts import TUNED, read_scores, score_file
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.encoder.encode import encode
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.encoder.weighted import encoder_at
from refine_fast.pipeline.evaluation.evaluate import score
from refine_fast.pipeline.reserve import reserve
from refine_fast.pipeline.stages.score import scored_sets

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "XLM-R, bf16": {"lora": 2, "query_prompt": "find: ", "document_prompt": "text: "},
    "Router": {},
    "dot product": {"fusion": "weights"},
    "Nomic": {"fusion": "embeddings"},
}


def documents(folder: Path) -> Path:
    things = ("pump", "valve", "boiler", "lathe", "crane", "furnace", "mixer", "press")
    places = ("harbour", "quarry", "bakery", "dairy")
    with (folder / "docs.jsonl").open("w") as file:
        for i in range(32):
            thing, place = things[i % 8], places[i // 8]
            text = f"The {thing} of the {place} takes {i + 3} tonnes a day. Its crew rests at noon."
            file.write(json.dumps({"_id": f"d{i}", "title": f"{place} {thing}", "text": text}))
            file.write("\n")
    return folder / "docs.jsonl"


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_is_of_the_product(kind: str, tmp_path: Path, minilm: Path) -> None:
    torch.manual_seed(0)
    ENCODERS[kind](tmp_path / "base", minilm)
    config = RunConfig(
        out=tmp_path / "run",
        docs=documents(tmp_path),
        model=str(tmp_path / "base"),
        curve=(0, 1),
        weight=0.35,
        band=(-1, 1),
        skip=2,
        max_steps=2,
        batch_size=8,
        lr=1e-2,
        ood=(),
        precision="fp32",
        **KINDS[kind],
    )
    context = run(config, console=Console(quiet=True))
    product = load_encoder(context.model)
    scored = encoder_at(0.35, context.encoder, context.path(TUNED), twin=context.twin)
    for role in ("query", "document"):
        ours, theirs = (
            encode(model, ["a pump", "the mill rests"], role=role, bf16=False)
            for model in (product, scored)
        )
        np.testing.assert_array_equal(ours, theirs)
    saved = read_scores(context.path(score_file("fused")))
    again = score(product, list(scored_sets(context).values()), bf16=False)
    for before, after in zip(saved.values(), again, strict=True):
        for metric, values in before.per_query.items():
            np.testing.assert_array_equal(after.per_query[metric], values)
    card = (context.model / "README.md").read_text()
    report = (context.out / "report.md").read_text()
    for text in (card, report):
        assert ("dot product divided by" in text) == (kind == "dot product")
        assert ("cosine" in text) == (kind != "dot product")
    if "lora" in KINDS[kind]:
        adapter = load_file(context.out / "adapter" / "adapter_model.safetensors")
        assert all("lora_" in tensor for tensor in adapter)
        served = SentenceTransformer(str(context.model), device="cpu")
        assert (served.prompts["query"], served.prompts["document"]) == ("find: ", "text: ")
        weights = load_file(context.model / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        assert main(["index", str(context.out), "--quiet"]) == 0


def test_a_full_disk_is_an_error_before_the_first_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a signal at some later one: the space of the rows is taken at once."""
    path = tmp_path / "rows.npy"
    values = reserve(path, np.float32, (500, 300))
    assert path.stat().st_blocks * 512 >= values.nbytes
    values[:] = 1
    values.flush()
    assert np.load(path).all()

    def full(descriptor: int, start: int, length: int) -> None:
        assert (start, length) == (0, os.fstat(descriptor).st_size)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    code = errno.EOPNOTSUPP
    assert reserve(path, np.float32, (2, 3)).shape == (2, 3)
    code = errno.ENOSPC
    with pytest.raises(OSError, match=r"No space left on device: .*rows\.npy"):
        reserve(path, np.float32, (2, 3))
    assert not path.exists()
