"""The README's training examples, run: a plain loop and a Hugging Face Trainer over info_nce."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import refine_fast as rf

QUERIES = ["a river in France", "the boiling point of water", "who wrote Hamlet", "capital of Japan", "speed of light", "moon landing"]
DOCUMENTS = ["the Loire", "100 degrees Celsius", "William Shakespeare", "Tokyo", "299792 km/s", "Apollo 11 in 1969"]


def test_plain_loop(minilm: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")
    loss = rf.nn.InfoNCELoss(temperature=0.02, learnable=True)
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=1e-4)
    losses = []
    for _ in range(4):
        q, d = (model(model.preprocess(texts))["sentence_embedding"] for texts in (QUERIES, DOCUMENTS))
        value = loss(q, d)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    assert loss.temperature.item() != pytest.approx(0.02, abs=1e-6)


def test_hugging_face_trainer(minilm: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)

    class Retriever(torch.nn.Module):
        """Mean-pooled MiniLM; what the Trainer asks of a model is a dict with the loss."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = transformers.AutoModel.from_pretrained(minilm)
            self.loss = rf.nn.InfoNCELoss(temperature=0.02)

        def embed(self, tokens: dict[str, Tensor]) -> Tensor:
            mask = tokens["attention_mask"][..., None]
            return (self.encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)

        def forward(self, queries: dict[str, Tensor], documents: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": self.loss(self.embed(queries), self.embed(documents))}

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)

    def collate(pairs: list[tuple[str, str]]) -> dict[str, dict[str, Tensor]]:
        queries, documents = (tokenizer(list(texts), padding=True, return_tensors="pt").data for texts in zip(*pairs, strict=True))
        return {"queries": queries, "documents": documents}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=6, learning_rate=1e-4, warmup_steps=0, logging_steps=1,
        remove_unused_columns=False, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(Retriever(), arguments, collate, list(zip(QUERIES, DOCUMENTS, strict=True)))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
