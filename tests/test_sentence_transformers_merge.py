"""``merge`` beside a weighted mean in float64; what it leaves to sentence-transformers; what it
refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")
from encoders import BERT, ENCODERS, layered, plain
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from refine_fast.integrations.sentence_transformers import merge, merging

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a pump in the mill", "the crew rests at noon"]


def small(seed: int = 0) -> SentenceTransformer:
    """Static embeddings and a dense layer, with a prompt."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "pump": 1, "mill": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    modules = [
        StaticEmbedding(tokenizer, embedding_dim=3),
        Dense(3, 3, bias=False, activation_function=torch.nn.Tanh()),
    ]
    return SentenceTransformer(modules=modules, device="cpu", prompts={"query": "pump "})


def shifted(model: Any, seed: int) -> Any:
    """A copy whose every parameter is moved at random."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def assert_mean(merged: Any, models: list[Any], weights: list[float]) -> None:
    """Asserts that every tensor of merged is the weighted mean of the models'."""
    states = [model.state_dict() for model in models]
    assert merged.state_dict().keys() == states[0].keys()
    for name, tensor in merged.state_dict().items():
        parts = [w * state[name].double() for w, state in zip(weights, states, strict=True)]
        expected = (sum(parts) / sum(weights)).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        (None, [1, 1, 1]),
        (2, [1, 1, 1]),
        ([1, 3, 0.5], [1, 3, 0.5]),
        ((0, 0, 2), [0, 0, 1]),
        ({2: 1, 0: 5, 1: 0}, [5, 0, 1]),
        (np.float32(2), [1, 1, 1]),
        ([np.float32(0.5), np.int64(2), 1], [0.5, 2, 1]),
    ],
    ids=str,
)
def test_weights(given: Any, weights: list[float]) -> None:
    models = [small(seed) for seed in range(3)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    models[0].train()
    models[0][1].linear.weight.requires_grad_(False)
    merged = merge(models, parameters=None if given is None else {"weight": given})
    assert_mean(merged, models, weights)
    for model, state in zip(models, before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name])
    assert type(merged) is SentenceTransformer
    assert not merged.training
    assert not merged[1].linear.weight.requires_grad
    assert merged[0].embedding.weight.requires_grad
    assert merged.prompts["query"] == "pump "


STREAMED = [
    "BERT",
    "XLM-R, bf16",
    "T5",
    "Qwen3-Embedding",
    "Nomic",
    "Router",
    "half static Router",
    "static",
    "dot product",
]


@pytest.mark.parametrize("kind", [*STREAMED, "pickled"])
def test_folders(kind: str, tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder nothing is loaded but the first model: its tensors are read from the files."""
    for seed in range(3):
        torch.manual_seed(seed)
        ENCODERS[kind](tmp_path / str(seed), minilm)
    folders = [tmp_path / str(seed) for seed in range(3)]
    loaded = [SentenceTransformer(str(folder), device="cpu") for folder in folders]
    streamed: list[Path] = []
    stream = merging.fuse_into

    def record(model: Any, folder: Path, share: float) -> None:
        streamed.append(folder)
        stream(model, folder, share)

    monkeypatch.setattr(merging, "fuse_into", record)
    merged = merge(folders, parameters={"weight": [1, 2, 5]}, local_files_only=True)
    assert streamed == (folders[1:] if kind in STREAMED else [])
    assert_mean(merged, loaded, [1, 2, 5])
    merged.save_pretrained(str(tmp_path / "merged"))
    again = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    np.testing.assert_array_equal(merged.encode_query(TEXTS), again.encode_query(TEXTS))
    mixed = merge([loaded[0], folders[1], loaded[2]], parameters={"weight": [1, 2, 5]})
    assert_mean(mixed, loaded, [1, 2, 5])


def test_the_output_dtype() -> None:
    models = [small(0), small(1).half()]
    assert {t.dtype for t in merge(models).state_dict().values()} == {torch.float32}
    for dtype in ("float16", torch.bfloat16, torch.float64):
        expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        merged = merge(models, out_dtype=dtype)
        assert {tensor.dtype for tensor in merged.state_dict().values()} == {expected}
    assert models[1][0].embedding.weight.dtype == torch.float16


def test_tied_weights_stay_tied() -> None:
    models = [small(0), small(1)]
    for model in models:
        model[1].linear.weight = model[0].embedding.weight
    merged = merge(models)
    assert merged[1].linear.weight is merged[0].embedding.weight
    assert merged[0].embedding.weight is not models[0][0].embedding.weight
    assert_mean(merged, models, [1, 1])


@pytest.mark.parametrize(
    ("model_class", "network"),
    [(CrossEncoder, "BertForSequenceClassification"), (SparseEncoder, "BertForMaskedLM")],
)
def test_other_classes(model_class: Any, network: str, tmp_path: Path, minilm: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain("BertConfig", network, intermediate_size=32, num_labels=1, **sizes)(tmp_path, minilm)
    model = model_class(str(tmp_path), device="cpu")
    other = shifted(model, 1)
    merged = merge([model, other], parameters={"weight": [3, 1]})
    assert type(merged) is model_class
    assert_mean(merged, [model, other], [3, 1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "slerp"},
        {"method": "task_arithmetic", "base_model": small(3)},
        {"parameters": {"weight": [2, -1]}},
        {"parameters": {"weight": [1, 1, 1]}},
        {"parameters": {"weight": 0}},
        {"parameters": {"weight": "much"}},
        {"parameters": {"weight": {0: 1}}},
        {"parameters": {"normalize": False}},
        {"parameters": {"typo": True}},
        {"dtype": None},
        {"dtype": "float16"},
        {"dtype": "int8"},
        {"out_dtype": "unknown"},
        {"batch_options": ...},
        {"device": "cpu", "dtype": torch.float64, "token": False},
    ],
    ids=lambda arguments: str(list(arguments.items())),
)
def test_the_rest_is_left_to_mergekit(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def theirs(cls: type, models: object, method: str, **given: Any) -> str:
        seen.update(given, method=method, models=models, cls=cls)
        return "theirs"

    monkeypatch.setattr(SentenceTransformer, "merge", classmethod(theirs))
    models = [small(0), small(1)]
    assert merge(models, **arguments) == "theirs"
    assert seen["cls"] is SentenceTransformer
    assert seen["models"] is models
    for name, value in arguments.items():
        assert seen[name] is value


def altered(problem: str) -> SentenceTransformer:
    model = small(1)
    if problem == "tokenizer":
        words = {"[UNK]": 0, "mill": 1, "pump": 2}
        model[0].tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    elif problem == "configuration":
        model[1].module_output_name = "other"
    elif problem == "type":
        model[1].activation_function = torch.nn.ReLU()
    elif problem == "ties":
        model[1].linear.weight = model[0].embedding.weight
    elif problem == "tensors":
        model.register_buffer("extra", torch.ones(2))
    elif problem == "shape":
        model[0].embedding.weight = torch.nn.Parameter(torch.ones(4, 3))
    return model


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("tokenizer", "vocabulary or special tokens differ in model 2"),
        ("configuration", "different configuration in model 2"),
        ("type", "different configuration in model 2"),
        ("ties", "model 2 has other tensors or other tied weights"),
        ("tensors", "model 2 has other tensors or other tied weights"),
        ("shape", r"\[3, 3\] in model 0 and \[4, 3\] in model 2"),
    ],
)
def test_models_that_differ(problem: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge([small(0), small(2), altered(problem)])


def test_integers_must_agree() -> None:
    models = [small(0), small(1)]
    for model in models:
        model.register_buffer("count", torch.tensor(3))
    assert merge(models).count == 3
    models[1].count += 1
    with pytest.raises(ValueError, match="integers of 'count' differ between models 0 and 1"):
        merge(models)


def test_folders_that_differ(tmp_path: Path, minilm: Path) -> None:
    """The same tensors under another pooling or another configuration."""
    layered(BERT, "mean")(tmp_path / "mean", minilm)
    layered(BERT, "cls")(tmp_path / "cls", minilm)
    with pytest.raises(ValueError, match="different configuration in model 1"):
        merge([tmp_path / "mean", tmp_path / "cls"])
    layered(BERT, "mean")(tmp_path / "other", minilm)
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="in model 1"):
        merge([tmp_path / "mean", tmp_path / "other"])


def test_inputs_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two or more models \(got 1\)"):
        merge([small()])
    with pytest.raises(ValueError, match="two or more models"):
        merge(tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"SentenceTransformer instances.*\(got dict\)"):
        merge([small(), {}])  # type: ignore[list-item]
