"""Adapters as PEFT writes them: fused as if merged first, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse_models import SMALL, WEIGHT, build
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertForMaskedLM

import refine_fast as rf
from refine_fast.errors import RefineFastError
from refine_fast.fuse.names import match_names


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

    merge = r": merge it with PEFT's merge_and_unload, save the merged model, and fuse that with"
    refused("not a plain LoRA adapter \\(DoRA\\)" + merge, use_dora=True)
    refused("aLoRA", alora_invocation_tokens=[1])
    refused("layer_replication.*" + merge, layer_replication=[[0, 1], [0, 1]])
    refused("trainable_token_indices.*" + merge, trainable_token_indices=[1])
    refused("BD-LoRA", use_bdlora={"nblocks": 2})
    refused(r"\(LoHa\)", peft_type="LOHA")
    refused(r"\(NEXTYEAR\)", peft_type="NEXTYEAR")
    # PEFT has changed the base before it trains these two
    refused("pissa_niter_4", init_lora_weights="pissa_niter_4")
    refused("olora", init_lora_weights="olora")
    refused("is not a LoRA configuration", r="many")
    refused("is not a LoRA configuration", rank_pattern=["query"])
    refused("is not a LoRA configuration", alpha_pattern={"(": 2})
    refused("is not a LoRA configuration", alpha_pattern={"a{99999999999999999999}": 2})
    refused("is not a LoRA configuration", rank_pattern={"(" * 2000 + ")" * 2000: 2})
    refused("is not a LoRA configuration", r=10**400)
    refused("is not a LoRA configuration", lora_alpha=10**400)
    refused("at rank 3", r=3)
    refused("at rank 0", rank_pattern={"query": 0})
    weights = load_file(tmp_path / "base" / "model.safetensors")
    changed = {
        name: t.to(torch.int32) if "query.weight" in name else t for name, t in weights.items()
    }
    save_file(changed, tmp_path / "base" / "model.safetensors")
    refused("query.weight, which is I32 .* dequantize")
    build("qwen3", 0).save_pretrained(tmp_path / "base")
    refused("which the base does not have: give the base that it was trained on, or merge")
    build("bert", 0).save_pretrained(tmp_path / "base")
    content = load_file(tmp_path / "good" / "adapter_model.safetensors")
    new = "base_model.model.encoder.layer.0.attention.self.query.new_vector"
    for name in (new, new.replace("new_vector", "lora_new.weight")):
        extra = content | {name: torch.ones(2)}
        save_file(extra, tmp_path / "good" / "adapter_model.safetensors")
        refused(name.removeprefix("base_model.model.encoder"))
    save_file(content, tmp_path / "good" / "adapter_model.safetensors")
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


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("IA3", "IA3"),
        ("LoHa", "LoHa"),
        ("LoKr", "LoKr"),
        ("AdaLora", "AdaLoRA"),
        ("Vera", "VeRA"),
        ("OFT", "OFT"),
        ("BOFT", "BOFT"),
        ("LNTuning", "LayerNorm tuning"),
        ("PromptTuning", "prompt tuning, which changes no weights"),
        ("PrefixTuning", "prefix tuning, which changes no weights"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path: Path, kind: str, name: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    settings: dict[str, dict[str, Any]] = {
        "IA3": {"target_modules": ["key"], "feedforward_modules": []},
        "AdaLora": {"target_modules": ["query"], "total_step": 10},
        "OFT": {"target_modules": ["query"], "r": 0, "oft_block_size": 8},
        "BOFT": {"target_modules": ["query"], "boft_block_size": 8},
        "LNTuning": {"target_modules": ["LayerNorm"]},
        "PromptTuning": {"num_virtual_tokens": 2, "task_type": "FEATURE_EXTRACTION"},
        "PrefixTuning": {"num_virtual_tokens": 2, "task_type": "FEATURE_EXTRACTION"},
    }
    config = getattr(peft, f"{kind}Config")(**settings.get(kind, {"target_modules": ["query"]}))
    model = build("bert", 0)
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(RefineFastError, match=name) as error:
        rf.fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "\n" not in str(error.value)


def with_head(peft: Any, targets: list[str], folder: Path) -> BertForMaskedLM:
    """A LoRA adapter of a BERT with a head, under base's encoder; returns the merged model."""
    model = BertForMaskedLM(BertConfig(**SMALL)).eval()
    model.bert.load_state_dict(build("bert", 0).state_dict(), strict=False)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


@pytest.mark.parametrize(
    "targets", [["value"], ["query", "value"], ["query"], ["key"], ["dense"], ["word_embeddings"]]
)
def test_an_adapter_of_a_model_with_a_head(tmp_path: Path, targets: list[str]) -> None:
    """Its names carry the prefix "bert.", whatever layers they cover; the head's are left out."""
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    build("bert", 0).save_pretrained(tmp_path / "base")
    merged = with_head(peft, targets, tmp_path / "adapter").bert.state_dict()
    report = rf.fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", 1.0)
    assert any("carry the prefix 'bert.' in tuned only" in note for note in report.reconciled)
    if targets == ["dense"]:
        assert any("cls.predictions" in note for note in report.reconciled)
    for name, t in AutoModel.from_pretrained(tmp_path / "out").state_dict().items():
        wanted = merged.get(name, build("bert", 0).state_dict()[name])
        assert torch.allclose(t, wanted, atol=1e-5), name


def test_names_under_a_longer_prefix() -> None:
    """Of a model inside a model; a name that only looks like one stays without a partner."""
    base = ["layer.0.query.weight", "layer.0.key.weight", "layer.1.query.weight", "norm.weight"]
    tuned = ["model.text.layer.0.query.weight", "model.text.layer.1.query.weight"]
    match = match_names(base, [*tuned, "other.norm.weight"])
    assert match.pairs == {base[0]: tuned[0], base[2]: tuned[1]}
    assert match.notes == ["2 names carry the prefix 'model.text.' in tuned only"]
    assert match.extra == ["other.norm.weight"]
    match = match_names(tuned, [base[0], base[2]])
    assert match.pairs == {tuned[0]: base[0], tuned[1]: base[2]}
    assert match.notes == ["2 names carry the prefix 'model.text.' in base only"]


def test_an_adapter_of_the_head_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    build("bert", 0).save_pretrained(tmp_path / "base")
    with_head(peft, ["cls.predictions.transform.dense"], tmp_path / "adapter")
    with pytest.raises(RefineFastError, match="changes no tensor of the base"):
        rf.fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def lora(folder: Path, name: str = "default") -> torch.nn.Module:
    """Saves an adapter as PEFT does, a named one in a folder of its name; returns what is merged
    with build("bert", 0)."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["query"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = get_peft_model(build("bert", 0), config, adapter_name=name)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def assert_merged(folder: Path, merged: torch.nn.Module) -> None:
    for name, t in load_file(folder / "model.safetensors").items():
        assert torch.allclose(t, merged.state_dict()[name], atol=1e-5), name


def test_adapters_in_subfolders(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    build("bert", 0).save_pretrained(tmp_path / "base")
    merged = lora(tmp_path / "named", "mine")
    assert (tmp_path / "named" / "mine" / "adapter_config.json").is_file()
    rf.fuse(tmp_path / "base", tmp_path / "named", tmp_path / "out", 1.0)
    assert_merged(tmp_path / "out", merged)

    lora(tmp_path / "named", "other")
    with pytest.raises(
        RefineFastError, match="named holds 2 adapters, in mine, other: give the folder of one"
    ):
        rf.fuse(tmp_path / "base", tmp_path / "named", tmp_path / "again")
    rf.fuse(tmp_path / "base", tmp_path / "named" / "mine", tmp_path / "again", 1.0)
    assert_merged(tmp_path / "again", merged)

    # a trainer's folder: the last adapter, above its checkpoints
    lora(tmp_path / "named")
    rf.fuse(tmp_path / "base", tmp_path / "named", tmp_path / "last", 1.0)
    assert_merged(tmp_path / "last", merged)

    # a whole model is no adapter because one lies beside it
    whole = build("bert", 1)
    whole.save_pretrained(tmp_path / "tuned")
    lora(tmp_path / "tuned" / "adapter")
    report = rf.fuse(tmp_path / "base", tmp_path / "tuned", tmp_path / "whole", 1.0)
    assert "adapter/adapter_model.safetensors of tuned is not read" in str(report)
    assert_merged(tmp_path / "whole", whole)

    with pytest.raises(RefineFastError, match="is an adapter, not a model: give the model"):
        rf.fuse(tmp_path / "named", tmp_path / "tuned", tmp_path / "other")


@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_an_adapter_in_a_model_of_sentence_transformers(tmp_path: Path, place: str) -> None:
    """Its other modules are fused with base's, and compared with them."""
    pytest.importorskip("peft", reason="needs peft: pip install '.[test]'")
    kinds = {place: "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    for name, bias in (("base", 0.0), ("tuned", 1.0)):
        folder = tmp_path / name
        for path in kinds:
            (folder / path).mkdir(parents=True, exist_ok=True)
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
        (folder / "2_Dense" / "config.json").write_text('{"activation_function": "x.Tanh"}')
        save_file({"linear.bias": torch.full((3,), bias)}, folder / "2_Dense" / "model.safetensors")
    build("bert", 0).save_pretrained(tmp_path / "base" / place)
    merged = lora(tmp_path / "tuned" / place)
    rf.fuse(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 1.0)
    assert_merged(tmp_path / "out" / place, merged)
    dense = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert dense["linear.bias"].eq(1).all()
    (tmp_path / "tuned" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    with pytest.raises(RefineFastError, match="pooling_mode is 'mean' in base and 'cls' in tuned"):
        rf.fuse(tmp_path / "base", tmp_path / "tuned", tmp_path / "again")
