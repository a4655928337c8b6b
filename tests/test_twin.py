"""Fusion of embeddings: a tuned encoder beside its frozen original, alone as a module and in a
run's loss and product."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn.functional import cross_entropy

from refine_fast.integrations.sentence_transformers import TwinEncoder
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.encoder.twin import save_twin
from refine_fast.pipeline.encoder.weighted import encoder_at
from refine_fast.pipeline.training import batches
from refine_fast.pipeline.training.loss import BatchLoss

pytestmark = pytest.mark.usefixtures("one_thread")

# a batch orders them by length
PAGES = [topics[name][: 150 + 40 * (3 * i % 8)] for i, name in enumerate(sorted(topics)[:8])]
QUERIES = [page[:60] for page in PAGES]


def tuned_from(folder: Path) -> SentenceTransformer:
    """A neighbour of the encoder: every parameter moved at random."""
    model = load_encoder(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def unit(model: SentenceTransformer, texts: list[str], **how: str) -> np.ndarray:
    rows = model.encode(texts, **how).astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def twin(tiny: Path) -> SentenceTransformer:
    return TwinEncoder(tuned_from(tiny), load_encoder(tiny), 0.35).model("cpu")


def test_the_weighted_sum_of_unit_vectors(twin: SentenceTransformer, tiny: Path) -> None:
    """... with the prompts of the two: against float64; what float32 rounds of it is 2e-7."""
    tuned, frozen = (
        unit(model, PAGES, prompt_name="query") for model in (tuned_from(tiny), load_encoder(tiny))
    )
    assert np.abs(tuned - frozen).max() > 0.05
    for weight in (0, 0.35, 1):
        twin[0].weight = weight
        expected = weight * tuned + (1 - weight) * frozen
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(
            twin.encode(PAGES, prompt_name="query"), expected, rtol=0, atol=2e-7
        )
    twin[0].weight = 0.35


def test_encoders_that_give_no_unit_vectors(tiny: Path) -> None:
    """Without their last module, Normalize, the lengths differ; the weight is that of the
    directions all the same."""
    whole = TwinEncoder(tuned_from(tiny), load_encoder(tiny), 0.35).model("cpu")
    short = TwinEncoder(tuned_from(tiny), load_encoder(tiny), 0.35).model("cpu")
    for encoder in (short[0].tuned, short[0].frozen):
        encoder.pop(2)
    np.testing.assert_allclose(short.encode(PAGES), whole.encode(PAGES), rtol=0, atol=2e-7)


def test_saved_and_loaded_it_is_the_same_to_the_bit(
    twin: SentenceTransformer, tmp_path: Path
) -> None:
    twin.save_pretrained(str(tmp_path), create_model_card=False)
    expected = twin.encode_query(PAGES)
    for loaded in (
        SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu"),
        load_encoder(tmp_path),
    ):
        assert np.array_equal(loaded.encode_query(PAGES), expected)
        assert loaded.prompts == twin.prompts
        assert loaded.max_seq_length == 96
        assert loaded.get_embedding_dimension() == 32


def test_at_weight_1_it_is_scored_as_it_is_saved(tiny: Path, tmp_path: Path) -> None:
    """As unit vectors, which an encoder under the dot product does not give."""
    base, tuned = load_encoder(tiny), tuned_from(tiny)
    for encoder, name in ((base, "base"), (tuned, "tuned")):
        encoder.pop(2)
        encoder.similarity_fn_name = "dot"
        encoder.save_pretrained(str(tmp_path / name), create_model_card=False)
    save_twin(tmp_path / "tuned", tmp_path / "base", 1.0, tmp_path / "product")
    scored = encoder_at(1.0, tmp_path / "base", tmp_path / "tuned", twin=True).encode_query(PAGES)
    assert np.abs(np.linalg.norm(tuned.encode_query(PAGES), axis=1) - 1).min() > 0.1
    assert np.array_equal(load_encoder(tmp_path / "product").encode_query(PAGES), scored)


def test_the_frozen_one_stays_frozen(tiny: Path) -> None:
    """In a training of one's own: in evaluation mode, without gradients; the tuned one has them,
    and dropout."""
    twin = TwinEncoder(load_encoder(tiny), load_encoder(tiny).train(), 0.35).model("cpu")
    assert not any(module.training for module in twin[0].frozen.modules())
    twin.train()
    assert twin[0].tuned.training
    assert not any(module.training for module in twin[0].frozen.modules())
    assert not any(parameter.requires_grad for parameter in twin[0].frozen.parameters())
    twin(twin.preprocess(PAGES))["sentence_embedding"].sum().backward()
    assert all(parameter.grad is None for parameter in twin[0].frozen.parameters())
    assert sum(parameter.grad is not None for parameter in twin[0].tuned.parameters()) > 10


def test_what_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^weight must be from 0 to 1 \(got 1.5\)$"):
        TwinEncoder(load_encoder(tiny), load_encoder(tiny), 1.5)
    one = load_encoder(tiny)
    for frozen in (one, SentenceTransformer(modules=[*one], device="cpu")):
        with pytest.raises(ValueError, match=r"^tuned and frozen share parameters, .*model twice$"):
            TwinEncoder(one, frozen)
    assert all(parameter.requires_grad for parameter in one.parameters())
    other = load_encoder(tiny)
    other.tokenizer.add_tokens(["unheard-of"])
    with pytest.raises(
        ValueError,
        match=r"^tuned and frozen have different vocabularies; they must read the same tokens$",
    ):
        TwinEncoder(load_encoder(tiny), other)


@pytest.mark.parametrize(("mini_batch", "cached"), [(None, False), (3, False), (3, True)])
def test_the_loss_of_a_run(tiny: Path, mini_batch: int | None, cached: bool) -> None:
    """The frozen embeddings come with the batch; value and gradients are those of the plain formula
    in float64, through the tuned encoder alone, with gradient caching too."""
    frozen = [
        unit(load_encoder(tiny), texts, prompt_name=role)
        for role, texts in (("query", QUERIES), ("document", PAGES))
    ]
    examples = [
        batches.Example(query, i, ((i + 1) % 8,), frozenset({i}), 7 - i)
        for i, query in enumerate(QUERIES)
    ]
    model = tuned_from(tiny).double().eval()
    batch = batches.Collator(
        model, examples, PAGES, batches.Twin(0.35, frozen[0][::-1], frozen[1])
    )([{"row": i} for i in range(8)])
    sides = [
        {k.removeprefix(f"{side}_"): v for k, v in batch.items() if k.startswith(f"{side}_")}
        for side in ("query", "document")
    ]
    loss = BatchLoss(model, 0.05, mini_batch, cached, 0.35)(sides, batch["label"])
    loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }

    model.zero_grad()
    fused = []
    for role, texts, rows in zip(("query", "document"), (QUERIES, PAGES), frozen, strict=True):
        tuned = model(model.preprocess(texts, prompt=model.prompts[role]))["sentence_embedding"]
        mixed = 0.35 * tuned / tuned.norm(dim=1, keepdim=True) + 0.65 * torch.from_numpy(rows)
        fused.append(mixed / mixed.norm(dim=1, keepdim=True))
    expected = cross_entropy(fused[0] @ fused[1].T / 0.05, torch.arange(8))
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=0)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert largest > 1e-5
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, model.get_parameter(name).grad, rtol=1e-6, atol=float(1e-8 * largest)
        )
