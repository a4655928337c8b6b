"""Layouts that transformers, sentence-transformers and PEFT write: fused, loaded again, and
compared with torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
)

import refine_fast as rf
from refine_fast import reference
from refine_fast.errors import RefineFastError

WEIGHT = 0.35

SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(**SMALL, **SPECIAL, cls_token_id=1, sep_token_id=2)
    ),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**SMALL, **SPECIAL, num_key_value_heads=2, head_dim=8)),
}


def build(kind: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return MODELS[kind]().eval()


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


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
@pytest.mark.parametrize("variant", ["plain", "rslora", "patterns", "embedding", "saved module"])
def test_lora_adapter(tmp_path: Path, kind: str, variant: str) -> None:
    """The same as merging the adapter with PEFT in float32 and fusing with the merged model."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    base = build(kind, 0)
    base.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    layers = ["query", "value"] if kind == "bert" else ["q_proj", "down_proj"]
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(layers)}
    if variant == "rslora":
        settings["use_rslora"] = True
    elif variant == "patterns":
        settings |= {"rank_pattern": {layers[0]: 2}, "alpha_pattern": {layers[1]: 3}}
    elif variant == "embedding":
        settings["target_modules"].append("word_embeddings" if kind == "bert" else "embed_tokens")
    elif variant == "saved module":
        settings["modules_to_save"] = ["LayerNorm" if kind == "bert" else "norm"]
    adapted = peft.get_peft_model(build(kind, 0), peft.LoraConfig(**settings))
    torch.manual_seed(2)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    report = rf.fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", WEIGHT)
    assert any("adapter of rank 4" in note for note in report.reconciled)
    found, changed = AutoModel.from_pretrained(tmp_path / "out").state_dict(), 0
    for name, t in base.state_dict().items():
        if t.is_floating_point():
            wanted = torch.lerp(t.double(), merged.state_dict()[name].double(), WEIGHT)
            # float32 product of rank 4 and three roundings of values below 4: a few times 2^-23 of
            # them
            assert (found[name].double() - wanted).abs().max() <= 1e-6, name
            changed += not torch.equal(t, found[name])
        if torch.equal(t, merged.state_dict()[name]):
            assert torch.equal(found[name], t), name
    assert changed >= 4


def test_adapters_that_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    build("bert", 0).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    peft.get_peft_model(build("bert", 0), config).save_pretrained(tmp_path / "good")

    def refused(message: str, **changes: object) -> None:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        path = tmp_path / "bad" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(RefineFastError, match=message):
            rf.fuse(tmp_path / "base", tmp_path / "bad", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("DoRA", use_dora=True)
    refused("aLoRA", alora_invocation_tokens=[1])
    refused("LOHA", peft_type="LOHA")
    # PEFT has changed the base before it trains these two
    refused("pissa_niter_4", init_lora_weights="pissa_niter_4")
    refused("olora", init_lora_weights="olora")
    refused("is not a LoRA configuration", r="many")
    refused("is not a LoRA configuration", rank_pattern=["query"])
    refused("is not a LoRA configuration", alpha_pattern={"(": 2})
    refused("at rank 3", r=3)
    refused("at rank 0", rank_pattern={"query": 0})
    weights = load_file(tmp_path / "base" / "model.safetensors")
    changed = {
        name: t.to(torch.int32) if "query.weight" in name else t for name, t in weights.items()
    }
    save_file(changed, tmp_path / "base" / "model.safetensors")
    refused("query.weight, which is I32 .* dequantize")
    build("qwen3", 0).save_pretrained(tmp_path / "base")
    refused("which the base does not have")
    (tmp_path / "good" / "adapter_model.safetensors").rename(
        tmp_path / "good" / "adapter_model.bin"
    )
    refused("adapter_model.safetensors is missing: load the adapter with PEFT and save it again")


def test_lora_over_float64(tmp_path: Path) -> None:
    """The sum is taken in the width of the base: what an adapter does not change stays
    bit-equal."""
    base = torch.randn(8, 6, dtype=torch.float64)
    save_file({"layer.weight": base}, tmp_path / "base.safetensors")
    a, b = torch.randn(2, 6), torch.randn(8, 2)
    b[:4] = 0
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    save_file(
        {"layer.lora_A.weight": a, "layer.lora_B.weight": b}, adapter / "adapter_model.safetensors"
    )
    rf.fuse(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", 1.0)
    found = load_file(tmp_path / "out.safetensors")["layer.weight"]
    assert torch.equal(found[:4], base[:4])
    # float32 product of two terms below 16 in magnitude
    assert (found - (base + b.double() @ a.double())).abs().max() <= 4 * 16 * 2**-24
