"""Layouts that transformers and sentence-transformers write: fused, loaded again, and
compared with torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fuse_models import MODELS, SMALL, WEIGHT, build
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import AutoModel, BertConfig, BertModel

import refine_fast as rf
from refine_fast import reference
from refine_fast.errors import RefineFastError
from refine_fast.ops.lerp import lerp_


def assert_fused(
    found: torch.nn.Module, base: torch.nn.Module, tuned: torch.nn.Module, weight: float = WEIGHT
) -> None:
    theirs = tuned.state_dict()
    for name, t in base.state_dict().items():
        wanted = reference.lerp(t, theirs[name], weight) if t.is_floating_point() else t
        assert torch.equal(found.state_dict()[name], wanted), name


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_transformers_layouts(tmp_path: Path, kind: str, shards: str) -> None:
    base, tuned = build(kind, 0), build(kind, 1)
    for model, name in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(
            tmp_path / name, max_shard_size="5GB" if shards == "one file" else "20kB"
        )
    report = rf.fuse(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", WEIGHT)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (shards == "shards")
    assert_fused(AutoModel.from_pretrained(tmp_path / "out"), base, tuned)
    assert report.tensors.keys() == {
        name for name, t in base.state_dict().items() if t.is_floating_point()
    }
    assert report.not_finite == []


def sentence_transformer(folder: Path, seed: int, minilm: Path) -> SentenceTransformer:
    """MiniLM moved by noise, with the Dense and LayerNorm modules that some published models carry
    in subfolders."""
    torch.manual_seed(seed)
    model = SentenceTransformer(str(minilm), device="cpu")
    width = model.get_embedding_dimension()
    model.append(modules.Dense(width, 64))
    model.append(modules.LayerNorm(64))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    model.save(str(folder))
    return model


def test_sentence_transformers_with_modules_in_subfolders(tmp_path: Path, minilm: Path) -> None:
    base, tuned = (
        sentence_transformer(tmp_path / name, seed, minilm)
        for name, seed in (("base", 0), ("tuned", 1))
    )
    report = rf.fuse(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", WEIGHT)
    fused = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert_fused(fused, base, tuned)
    assert [type(part) for part in fused] == [type(part) for part in base]
    assert any("Dense" in name for name in report.tensors)
    texts = ["a first sentence", "another one"]
    assert fused.encode(texts).shape == (2, 64)

    # the same without a file: in place, twice over, the second time from the layout of older
    # versions
    model = SentenceTransformer(str(tmp_path / "base"), device="cpu")
    for weight, folder in ((0.8, "tuned"), (WEIGHT, "older")):
        if folder == "older":
            (tmp_path / "tuned").rename(tmp_path / "older")
            (tmp_path / "older" / "0_Transformer").mkdir()
            for name in ("config.json", "model.safetensors"):
                (tmp_path / "older" / name).rename(tmp_path / "older" / "0_Transformer" / name)
            content = json.loads((tmp_path / "older" / "modules.json").read_text())
            content[0]["path"] = "0_Transformer"
            (tmp_path / "older" / "modules.json").write_text(json.dumps(content))
        rf.fuse_into(model, tmp_path / folder, weight, base=tmp_path / "base")
        assert_fused(model, base, tuned, weight)
    assert (model.encode(texts) == fused.encode(texts)).all()

    # an encoder alone is not enough
    with pytest.raises(
        RefineFastError,
        match=r"0_Transformer lacks the tensor '.*linear.bias' and 3 more of the loaded model",
    ):
        rf.fuse_into(model, tmp_path / "older" / "0_Transformer")
    assert_fused(model, base, tuned)


@pytest.mark.parametrize("kind", MODELS)
def test_fuse_into(tmp_path: Path, kind: str) -> None:
    base, tuned = build(kind, 0), build(kind, 1)
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="20kB")
    model = build(kind, 0)
    rf.fuse_into(model, tmp_path / "tuned", WEIGHT)
    assert_fused(model, base, tuned)
    model = build(kind, 0).to(torch.bfloat16)
    rf.fuse_into(model, tmp_path / "tuned", WEIGHT, weights={"*.0.*": 0.0})
    for name, t in build(kind, 0).to(torch.bfloat16).state_dict().items():
        if t.is_floating_point():
            wanted = reference.lerp(t, tuned.state_dict()[name], 0.0 if ".0." in name else WEIGHT)
            assert torch.equal(model.state_dict()[name], wanted), name


class Tied(torch.nn.Module):
    """Three parameters, of which two are one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head, self.pooler = (torch.nn.Linear(2, 2, False) for _ in range(3))
        self.lm_head.weight = self.embed.weight


@pytest.mark.parametrize("names", [("lm_head", "embed"), ("embed", "lm_head"), ("embed", "embed")])
def test_fuse_into_with_base_does_not_compound(tmp_path: Path, names: tuple[str, str]) -> None:
    """A tied parameter that the files hold under different names, and a tensor that only tuned
    has."""
    base, tuned = (tmp_path / f"{side}.safetensors" for side in ("base", "tuned"))
    save_file({f"{names[0]}.weight": torch.zeros(2, 2)}, base)
    save_file({f"{names[1]}.weight": torch.ones(2, 2), "pooler.weight": torch.ones(2, 2)}, tuned)
    model = Tied()
    before = model.pooler.weight.clone()
    for weight in (0.5, 0.5, 0.25):
        notes = rf.fuse_into(model, tuned, weight, base=base)
        assert torch.equal(model.embed.weight, torch.full((2, 2), weight))
        assert torch.equal(model.pooler.weight, before)
        assert "pooler.weight is in tuned only: left alone" in notes


class Halves(torch.nn.Module):
    """A buffer that is the first half of another."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.zeros(8)
        self.register_buffer("a", whole[:4])
        self.register_buffer("b", whole)


def test_fuse_into_refuses_tensors_that_overlap(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.ones(8)}, tmp_path / "t.safetensors")
    model = Halves()
    with pytest.raises(RefineFastError, match="'b' of the model shares its memory"):
        rf.fuse_into(model, tmp_path / "t.safetensors", 1.0)
    assert not model.b.any()


def test_a_complex_tensor_stays_and_is_named(tmp_path: Path) -> None:
    """As in ``fuse``, which has the base's; also where a model has no others."""
    model = torch.nn.Module()
    model.phases = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    save_file({"phases": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "t.safetensors")
    notes = rf.fuse_into(model, tmp_path / "t.safetensors", 1.0)
    assert notes == ["phases is complex: left alone"]
    assert torch.equal(model.phases, torch.ones(2, dtype=torch.complex64))


def test_autograd_sees_the_change() -> None:
    w = torch.ones(3, requires_grad=True)
    y = (w * w).sum()
    lerp_(w.detach(), torch.zeros(3), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_negated_views() -> None:
    """Whose memory holds the negative of their values."""
    base, tuned = torch.randn(8), torch.randn(8)
    gold = torch.lerp(-base, tuned, 0.25)
    assert torch.equal(lerp_(torch._neg_view(base.clone()), tuned, 0.25), gold)
    gold = torch.lerp(base, -tuned, 0.25)
    assert torch.equal(lerp_(base.clone(), torch._neg_view(tuned), 0.25), gold)


def test_fuse_into_any_module(tmp_path: Path) -> None:
    """A torch.nn.Sequential that is no SentenceTransformer, and files in a type that the model is
    not loaded in."""
    base, tuned, model = (
        torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)) for _ in range(3)
    )
    for module, name in ((base, "base"), (tuned, "tuned")):
        save_file(
            {key: t.to(torch.float8_e4m3fn) for key, t in module.state_dict().items()},
            tmp_path / f"{name}.safetensors",
        )
    rf.fuse_into(model, tmp_path / "tuned.safetensors", WEIGHT, base=tmp_path / "base.safetensors")
    rf.fuse(
        tmp_path / "base.safetensors",
        tmp_path / "tuned.safetensors",
        tmp_path / "out.safetensors",
        WEIGHT,
    )
    for name, t in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(model.state_dict()[name], t.float()), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 201}, r"word_embeddings.*\[200, 32\] in the loaded model"),
        ({"num_hidden_layers": 1}, "lacks the tensor 'encoder.layer.1.* of the loaded model"),
        ({"num_hidden_layers": 3}, "the loaded model lacks the tensor 'encoder.layer.2"),
    ],
)
def test_fuse_into_changes_nothing_when_it_does_not_fit(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    torch.manual_seed(1)
    BertModel(BertConfig(**SMALL | change)).save_pretrained(tmp_path / "tuned")
    model = build("bert", 0)
    with pytest.raises(RefineFastError, match=message):
        rf.fuse_into(model, tmp_path / "tuned", WEIGHT)
    assert_fused(model, build("bert", 0), build("bert", 0))


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize(
    "difference", ["prefix", "gamma", "prefix and gamma", "position_ids", "pooler", "cls", "head"]
)
def test_published_and_resaved_names(tmp_path: Path, side: str, difference: str) -> None:
    """How a published BGE, bert-base-uncased or ModernBERT and its re-saved fine-tune differ: each
    way is reconciled, and said."""
    base, tuned = build("bert", 0), build("bert", 1)
    for model, name in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(tmp_path / name)
    content = load_file(tmp_path / side / "model.safetensors")
    if "gamma" in difference:
        content = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): t
            for name, t in content.items()
        }
    if "prefix" in difference:
        content = {f"bert.{name}": t for name, t in content.items()}
    if difference == "position_ids":
        content["embeddings.position_ids"] = torch.arange(512)[None]
    elif difference == "pooler":
        content = {name: t for name, t in content.items() if "pooler" not in name}
    elif difference == "cls":
        content["cls.predictions.bias"] = torch.randn(200)
    elif difference == "head":
        content |= {"head.norm.weight": torch.randn(32), "decoder.bias": torch.randn(200)}
    save_file(content, tmp_path / side / "model.safetensors", {"format": "pt"})
    report = rf.fuse(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", WEIGHT)
    said = {"cls": ["cls.predictions"], "head": ["head.norm.weight", "decoder.bias"]}.get(
        difference, difference.split(" and ")
    )
    assert all(word in "\n".join(report.reconciled) for word in said)
    out, ours = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "base" / "model.safetensors"),
    )
    assert out.keys() == ours.keys()
    for name, t in ours.items():
        plain = (
            name.removeprefix("bert.")
            .replace("LayerNorm.gamma", "LayerNorm.weight")
            .replace("LayerNorm.beta", "LayerNorm.bias")
        )
        partner = (
            tuned.state_dict().get(plain)
            if not (difference == "pooler" and "pooler" in name)
            else None
        )
        assert torch.equal(
            out[name],
            t
            if partner is None or not t.is_floating_point()
            else reference.lerp(t, partner, WEIGHT),
        ), name
