"""Encoders as people have them: each comes to a product that is what was scored, or is refused
before work with what to do."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import BERT, ENCODERS, SMALL, T5, Make, layered, own_module, plain, router
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from refine_fast.errors import RefineFastError
from refine_fast.fuse import fuse
from refine_fast.pipeline.encoder.adapters import adapter_folder, add_lora
from refine_fast.pipeline.encoder.check import check_encoder
from refine_fast.pipeline.encoder.encode import compares_by_cosine, encode
from refine_fast.pipeline.encoder.fused import load_fused
from refine_fast.pipeline.encoder.layers import transformers_of
from refine_fast.pipeline.encoder.load import document_tokenizer, encoder_folder, load_encoder
from refine_fast.pipeline.encoder.options import EncoderOptions
from refine_fast.pipeline.encoder.prepare import CODE, copy_missing, prepare_encoder
from refine_fast.pipeline.encoder.twin import load_twin, save_twin
from refine_fast.pipeline.training.batches import Example, features_of
from refine_fast.pipeline.training.check import check_training
from refine_fast.pipeline.training.memory import fit_training
from refine_fast.pipeline.training.trained import Trained
from refine_fast.pipeline.training.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")

THINGS = ["pump", "valve", "boiler", "lathe", "crane", "furnace", "mixer", "press"]
DOCUMENTS = [f"The {thing} of the mill is number {i}." for i, thing in enumerate(THINGS)]
QUERIES = [f"{thing} in the mill" for thing in THINGS]
EXAMPLES = [Example(query, i, ((i + 1) % 8,), frozenset({i}), i) for i, query in enumerate(QUERIES)]
SIDES = (("query", QUERIES), ("document", DOCUMENTS))


def made(make: Make, folder: Path, minilm: Path) -> Path:
    torch.manual_seed(0)
    make(folder, minilm)
    return folder


def tune(model: SentenceTransformer, folder: Path, **how: object) -> None:
    settings = {"max_steps": 1, "batch_size": 4, "lr": 1e-2, "warmup": 0.0, **how}
    train(model, EXAMPLES, DOCUMENTS, folder / "checkpoints", **settings)
    model.save_pretrained(str(folder / "tuned"), create_model_card=False)


def rows(model: SentenceTransformer) -> list[np.ndarray]:
    return [encode(model, texts, role=role, bf16=False) for role, texts in SIDES]


@pytest.mark.parametrize("name", ENCODERS)
def test_the_product_is_what_was_scored(name: str, tmp_path: Path, minilm: Path) -> None:
    """Prepared, checked, trained and fused, in memory (for the scores) and on the disk (the
    product): equal to the bit, and what sentence-transformers alone makes of the product."""
    trust = name == "own code"
    given = made(ENCODERS[name], tmp_path / "given", minilm)
    base = prepare_encoder(given, EncoderOptions(trust_remote_code=trust))
    check_training(check_encoder(base, trust_remote_code=trust), base)

    model = load_encoder(base, trust_remote_code=trust)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tune(model, tmp_path)
    copy_missing(base, tmp_path / "tuned", CODE)
    before = rows(load_encoder(base, trust_remote_code=trust))
    tuned = tmp_path / "tuned"
    after = rows(load_fused(base, tuned, 0.35, trust_remote_code=trust))
    for old, new in zip(before, after, strict=True):  # both sides have learned
        assert np.abs(new - old).max() > 1e-4

    fuse(base, tuned, tmp_path / "product", 0.35)
    product = load_encoder(tmp_path / "product", trust_remote_code=trust)
    for row, expected in zip(rows(product), after, strict=True):
        np.testing.assert_array_equal(row, expected)
    for file in base.rglob("*.safetensors"):
        fused = load_file(tmp_path / "product" / file.relative_to(base))
        assert {k: t.dtype for k, t in load_file(file).items()} == {
            k: t.dtype for k, t in fused.items()
        }

    served = SentenceTransformer(
        str(tmp_path / "product"),
        device="cpu",
        trust_remote_code=trust,
        model_kwargs={"dtype": torch.float32},
    ).float()
    theirs = served.similarity(served.encode_query(QUERIES), served.encode_document(DOCUMENTS))
    ours = after[0] @ after[1].T
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(ours).max())


def test_what_training_reads_is_what_is_encoded(tmp_path: Path, minilm: Path) -> None:
    """Prompt, route and length limit of each side."""
    for name in ("Qwen3-Embedding", "Router", "half static Router", "EmbeddingGemma"):
        model = load_encoder(made(ENCODERS[name], tmp_path / name, minilm))
        for role, texts in SIDES:
            with torch.no_grad():
                trained = model(features_of(model, role, texts))["sentence_embedding"]
            trained = torch.nn.functional.normalize(trained, dim=1)
            np.testing.assert_allclose(
                trained, encode(model, texts, role=role, bf16=False), rtol=0, atol=1e-5
            )


@pytest.mark.parametrize(("mini_batch", "cached"), [(None, False), (3, False), (3, True)])
def test_each_route_is_trained_by_its_own_texts(
    tmp_path: Path, minilm: Path, mini_batch: int | None, cached: bool
) -> None:
    base = made(router, tmp_path / "router", minilm)
    tune(load_encoder(base), tmp_path, mini_batch=mini_batch, cached=cached)
    for route in ("query", "document"):
        before, after = (
            load_file(folder / f"{route}_0_Transformer" / "model.safetensors")
            for folder in (base, tmp_path / "tuned")
        )
        assert max((after[name] - before[name]).abs().max() for name in before) > 1e-3


@pytest.mark.parametrize("kind", ["pickled", "adapter", "no padding token", "model2vec"])
def test_a_prepared_copy_computes_what_its_base_does(
    kind: str, tmp_path: Path, minilm: Path
) -> None:
    base = made(ENCODERS[kind], tmp_path / "base", minilm)
    said: list[str] = []
    copy = prepare_encoder(base, cache=tmp_path / "cache", say=said.append)
    assert copy != base
    assert len(said) == 1
    assert not list(copy.rglob("*.bin"))
    theirs = peft_model(base) if kind == "adapter" else load_encoder(base)
    if kind == "no padding token":
        theirs.tokenizer.pad_token = "<|endoftext|>"
    for row, expected in zip(rows(load_encoder(copy)), rows(theirs), strict=True):
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)
    assert prepare_encoder(base, cache=tmp_path / "cache", say=said.append) == copy
    assert len(said) == 1  # made once


def peft_model(folder: Path) -> SentenceTransformer:
    """What peft makes of the adapter."""
    from peft import PeftModel

    base = load_encoder(Path(str(folder) + "-base"))
    base[0].model = PeftModel.from_pretrained(base[0].model, folder)
    return base


@pytest.mark.parametrize("place", [".", "checkpoint-500", "adapters"])
@pytest.mark.parametrize("itself", [False, True])
def test_an_adapter_below_a_complete_encoder_is_none_of_its(
    tiny: Path, tmp_path: Path, place: str, itself: bool
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    (base / place).mkdir(exist_ok=True)
    named = {"base_model_name_or_path": str(base) if itself else "BAAI/bge-m3"}
    (base / place / "adapter_config.json").write_text(json.dumps(named))
    assert adapter_folder(base) is None
    if place != ".":
        assert prepare_encoder(base, cache=tmp_path / "cache") == base


@pytest.mark.parametrize("place", [".", "0_Transformer", "0_Router/query_0_Transformer"])
def test_where_an_adapter_makes_an_encoder(tmp_path: Path, place: str) -> None:
    paths = ["0_Transformer", "0_Router", "1_Pooling"]
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    (tmp_path / "0_Router").mkdir()
    part = "query_0_Transformer"
    routes = json.dumps({"types": {part: ""}, "structure": {"query": [part]}})
    (tmp_path / "0_Router" / "router_config.json").write_text(routes)
    (tmp_path / place).mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / place / name).touch()
    assert adapter_folder(tmp_path) == tmp_path / place


def test_a_complete_base_is_used_as_it_is(tiny: Path, tmp_path: Path) -> None:
    """The second time without loading it; a change of the base is seen."""
    assert prepare_encoder(tiny, cache=tmp_path) == tiny
    marks = list(tmp_path.glob("encoders/*/as_is"))
    assert len(marks) == 1
    assert prepare_encoder(tiny, cache=tmp_path) == tiny
    assert list(tmp_path.glob("encoders/*/as_is")) == marks
    (tmp_path / "file").touch()
    closed = tmp_path / "file" / "cache"
    assert prepare_encoder(tiny, cache=closed) == tiny
    with pytest.raises(RefineFastError, match=r"encoders cannot be written to .*REFINE_FAST_CACHE"):
        prepare_encoder(tiny, EncoderOptions(query_prompt="q: "), cache=closed)
    changed = shutil.copytree(tiny, tmp_path / "changed")
    prepare_encoder(changed, cache=tmp_path)
    config = json.loads((changed / "config_sentence_transformers.json").read_text())
    prompts = {"query": "q: ", "passage": "passage: "}
    (changed / "config_sentence_transformers.json").write_text(
        json.dumps(config | {"prompts": prompts})
    )
    copy = prepare_encoder(changed, cache=tmp_path)
    assert copy != changed
    assert SentenceTransformer(str(copy), device="cpu").prompts["document"] == "passage: "


def test_options_become_part_of_the_encoder(tmp_path: Path, minilm: Path) -> None:
    """Prompts, similarity and dimensions, on a folder that has no place for them; empty prompts
    replace the model's own."""
    base = made(BERT, tmp_path / "bert", minilm)
    options = EncoderOptions(
        query_prompt="find: ", document_prompt="text: ", similarity="dot", dimensions=16
    )
    copy = prepare_encoder(base, options, cache=tmp_path / "cache")
    served = SentenceTransformer(str(copy), device="cpu")
    assert (served.prompts["query"], served.prompts["document"]) == ("find: ", "text: ")
    assert served.similarity_fn_name == "dot"
    raw = SentenceTransformer(str(base), device="cpu")
    for role, prompt in (("query", "find: "), ("document", "text: ")):
        expected = raw.encode([prompt + "oil"])[:, :16]
        np.testing.assert_allclose(
            encode(load_encoder(copy), ["oil"], role=role, bf16=False), expected, atol=1e-5
        )
    none = prepare_encoder(copy, EncoderOptions("", ""), cache=tmp_path / "cache")
    assert not any(SentenceTransformer(str(none), device="cpu").prompts.values())


def test_what_is_refused(tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = made(ENCODERS["own code"], tmp_path / "own", minilm)
    with pytest.raises(RefineFastError, match=r"modeling_own\.py.*add --trust-remote-code"):
        prepare_encoder(own, cache=tmp_path / "cache")
    bert = made(BERT, tmp_path / "bert", minilm)
    with pytest.raises(RefineFastError, match=r"dimensions: 33 is more than the encoder's 32"):
        prepare_encoder(bert, EncoderOptions(dimensions=33), cache=tmp_path / "cache")
    distance = layered(BERT, "mean", similarity_fn_name="euclidean")
    with pytest.raises(RefineFastError, match=r"euclidean distance.*--similarity cosine"):
        prepare_encoder(made(distance, tmp_path / "far", minilm), cache=tmp_path / "cache")
    static = load_encoder(made(ENCODERS["static"], tmp_path / "static", minilm))
    for trained, remedy in (
        (Trained(lora=4), "--lora"),
        (Trained(last_layers=1), "--train-layers"),
    ):
        with pytest.raises(RefineFastError, match=rf"no transformer.*leave out {remedy}"):
            trained.choose(static)


def test_what_cannot_work_is_found_before_training(tmp_path: Path, minilm: Path) -> None:
    broken = made(BERT, tmp_path / "broken", minilm)
    weights = load_file(broken / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(RefineFastError, match="to NaN or infinity"):
        check_encoder(broken)
    deaf = made(BERT, tmp_path / "deaf", minilm)
    for file in deaf.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(RefineFastError):
        check_encoder(prepare_encoder(deaf, cache=tmp_path / "cache"))
    frozen = load_encoder(made(router, tmp_path / "router", minilm))
    query_route = frozen[0].sub_modules["query"]
    query_route[0].forward = lambda features, **_: {
        **features, "token_embeddings": torch.randn(*features["input_ids"].shape, 32)
    }  # fmt: skip
    with pytest.raises(RefineFastError, match="its query route gets no gradient"):
        check_training(frozen, tmp_path / "router")


def test_an_encoder_that_changes_when_saved(tmp_path: Path, minilm: Path) -> None:
    """transformers reads every tokenizer beside a Qwen2 network as byte-level BPE. The remedy that
    the message names works."""
    qwen2 = plain("Qwen2Config", "Qwen2Model", **SMALL, num_key_value_heads=1)
    mixed = made(qwen2, tmp_path / "mixed", minilm)
    message = (
        rf"{mixed} changes when it is loaded and saved \(.*'WordPiece' in base and 'BPE' in tuned.*"
        r"save it once with sentence-transformers"
    )
    with pytest.raises(RefineFastError, match=message):
        check_training(load_encoder(mixed), mixed)
    SentenceTransformer(str(mixed), device="cpu").save_pretrained(str(tmp_path / "saved"))
    check_training(load_encoder(tmp_path / "saved"), tmp_path / "saved")


def test_large_dot_products_are_no_reason_to_refuse_an_encoder(
    tmp_path: Path, minilm: Path
) -> None:
    """At a fixed temperature the loss on two examples is exactly 0, and so is every gradient."""
    folder = made(ENCODERS["dot product"], tmp_path / "dot", minilm)
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.weight"] *= 1000
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    check_training(load_encoder(folder), folder)


def test_tied_weights_under_more_than_one_name(tmp_path: Path, minilm: Path) -> None:
    """As older transformers stored T5."""
    base = made(T5, tmp_path / "t5", minilm)
    weights = load_file(base / "model.safetensors")
    twice = weights | {"encoder.embed_tokens.weight": weights["shared.weight"].clone()}
    save_file(twice, base / "model.safetensors", {"format": "pt"})
    copy = prepare_encoder(base, cache=tmp_path / "cache")
    assert copy != base
    check_training(check_encoder(copy), copy)


def test_a_base_with_more_than_the_encoder(tmp_path: Path, minilm: Path) -> None:
    """A whole T5, whose decoder retrieval does not use."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    whole = plain("T5Config", "T5Model", **sizes, decoder_start_token_id=0)
    base = made(whole, tmp_path / "t5", minilm)
    copy = prepare_encoder(base, cache=tmp_path / "cache")
    check_training(check_encoder(copy), copy)


@pytest.mark.parametrize("name", ["BERT", "Router", "XLM-R, bf16"])
def test_lora(name: str, tmp_path: Path, minilm: Path) -> None:
    """The adapter alone is trained; merged, it computes what the adapted model did, and peft reads
    the adapter that is kept."""
    base = made(ENCODERS[name], tmp_path / "base", minilm)
    model = load_encoder(base)
    check_training(model, base, Trained(lora=2))
    whole = fit(model)
    adapters = add_lora(model, 2)
    assert fit(model) < whole
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    tune(model, tmp_path, max_steps=2)
    adapted = rows(model)
    for i, adapter in enumerate(adapters):
        adapter.save_pretrained(str(tmp_path / "adapter" / str(i)))
        adapter.merge_and_unload()
    for row, expected in zip(rows(model), adapted, strict=True):
        np.testing.assert_allclose(row, expected, rtol=0, atol=2e-5)
    assert np.abs(rows(model)[1] - rows(load_encoder(base))[1]).max() > 1e-4
    assert set(model.state_dict()) == set(load_encoder(base).state_dict())
    model.save_pretrained(str(tmp_path / "merged"), create_model_card=False)
    fuse(base, tmp_path / "merged", tmp_path / "product", 0.35)
    if name == "BERT":  # the adapter that is kept makes the same of the base
        kept = prepare_encoder(tmp_path / "adapter" / "0", cache=tmp_path / "cache")
        for row, expected in zip(rows(load_encoder(kept)), adapted, strict=True):
            np.testing.assert_allclose(row, expected, rtol=0, atol=2e-5)
        (base / "model.safetensors").touch()  # trained again
        assert prepare_encoder(tmp_path / "adapter" / "0", cache=tmp_path / "cache") != kept


# Post-norm, pre-norm with a final norm, two transformers, one whose stack is not called "layer".
@pytest.mark.parametrize("name", ["BERT", "ModernBERT", "Router", "T5"])
def test_the_last_layers_alone(name: str, tmp_path: Path, minilm: Path) -> None:
    """The others keep their bits; training takes less memory; the product fuses with the base."""
    base = made(ENCODERS[name], tmp_path / "base", minilm)
    model = load_encoder(base)
    check_training(model, base, Trained(last_layers=1))
    whole = fit(model)
    transformers = transformers_of(model)
    with pytest.raises(RefineFastError, match=r"2 must be less than the encoder's 2 layers"):
        Trained(last_layers=2).choose(model)
    Trained(last_layers=1).choose(model)
    assert fit(model) < whole
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tune(model, tmp_path, max_steps=2)
    for transformer in transformers:
        trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
        assert trained
        assert all(".1." in name for name in trained)
    for name, p in model.named_parameters():
        assert p.requires_grad or torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.save_pretrained(str(tmp_path / "tuned"), create_model_card=False)
    fuse(base, tmp_path / "tuned", tmp_path / "product", 0.35)


def fit(model: SentenceTransformer) -> int:
    return fit_training(
        model, QUERIES, DOCUMENTS, 8, batch_size=4, negatives=1, memory=None, bf16=False
    ).peak


def test_lora_resumes_after_a_kill(
    tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same weights as without one."""
    monkeypatch.setattr("refine_fast.pipeline.training.trainer.CHECKPOINT_SECONDS", 0.0)
    base = made(ENCODERS["XLM-R, bf16"], tmp_path / "base", minilm)

    def run(folder: Path, stop: int | None) -> SentenceTransformer:
        def watch(step: int, steps: int, note: str) -> None:
            if step == stop:
                raise KeyboardInterrupt

        model = load_encoder(base)
        torch.manual_seed(1)
        add_lora(model, 2)
        how = {"max_steps": 4, "batch_size": 4, "epochs": 9, "lr": 1e-2, "progress": watch}
        train(model, EXAMPLES, DOCUMENTS, folder, **how)
        return model

    expected = run(tmp_path / "whole", None).state_dict()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 3)
    assert (tmp_path / "killed" / "checkpoint-2").is_dir()
    resumed = run(tmp_path / "killed", None).state_dict()
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name


def test_a_twin_honours_route_and_dimensions(tmp_path: Path, minilm: Path) -> None:
    for name in ("Router", "Nomic"):
        folder = tmp_path / name
        folder.mkdir()
        base = made(ENCODERS[name], folder / "base", minilm)
        tune(load_encoder(base), folder)
        twin = load_twin(folder / "tuned", base, 0.35)
        for (role, texts), got in zip(SIDES, rows(twin), strict=True):
            tuned, frozen = (
                encode(load_encoder(part), texts, role=role, bf16=False)
                for part in (folder / "tuned", base)
            )
            mixed = 0.35 * tuned + 0.65 * frozen
            mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
            np.testing.assert_allclose(got, mixed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["XLM-R, bf16", "MPNet, fp16", "T5"])
def test_a_twin_is_saved_in_the_type_of_its_base(name: str, tmp_path: Path, minilm: Path) -> None:
    """What is saved is what was scored, and takes twice the space of the base, not four times."""
    base = made(ENCODERS[name], tmp_path / "base", minilm)
    tune(load_encoder(base), tmp_path)
    tuned, product = tmp_path / "tuned", tmp_path / "product"
    save_twin(tuned, base, 0.35, product)
    stored = {k: t.dtype for k, t in load_file(base / "model.safetensors").items()}
    for member in ("tuned", "frozen"):
        (file,) = product.rglob(f"{member}/model.safetensors")
        assert {k: t.dtype for k, t in load_file(file).items()} == stored
    scored = rows(load_twin(tuned, base, 0.35))
    for row, expected in zip(rows(load_encoder(product)), scored, strict=True):
        np.testing.assert_array_equal(row, expected)


def test_a_twin_of_an_encoder_with_a_module_of_its_own(tmp_path: Path, minilm: Path) -> None:
    base = made(own_module, tmp_path / "base", minilm)
    model = load_encoder(base, trust_remote_code=True)
    model.save_pretrained(str(tmp_path / "tuned"))
    copy_missing(base, tmp_path / "tuned", CODE)
    save_twin(tmp_path / "tuned", base, 0.35, tmp_path / "product", trust_remote_code=True)
    product = load_encoder(tmp_path / "product", trust_remote_code=True)
    for row, expected in zip(rows(product), rows(model), strict=True):
        np.testing.assert_allclose(
            row, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6
        )


def test_similarity_decides_whether_rows_are_unit_vectors(tmp_path: Path, minilm: Path) -> None:
    dot = load_encoder(made(ENCODERS["dot product"], tmp_path / "dot", minilm))
    assert not compares_by_cosine(dot)
    np.testing.assert_allclose(
        encode(dot, QUERIES, role="query", bf16=False), dot.encode_query(QUERIES), atol=1e-5
    )


def test_documents_are_cut_with_the_tokenizer_that_reads_them(tmp_path: Path, minilm: Path) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(minilm)("a pump of the mill").input_ids[1:-1]
    for name in ("static", "half static Router", "BERT"):
        tokenizer = document_tokenizer(load_encoder(made(ENCODERS[name], tmp_path / name, minilm)))
        ids = tokenizer("a pump of the mill", add_special_tokens=False)["input_ids"]
        assert ids == expected


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        ({"model.safetensors", "pytorch_model.bin"}, {"model.safetensors"}),
        ({"pytorch_model.bin"}, {"pytorch_model.bin"}),
        (
            {"model.safetensors", "pytorch_model.bin", "2_Dense/pytorch_model.bin"},
            {"model.safetensors", "2_Dense/pytorch_model.bin"},
        ),
    ],
)
def test_a_download_fetches_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: set[str], fetched: set[str]
) -> None:
    def snapshot(name: str, ignore_patterns: list[str]) -> str:
        for file in {*files, "config.json", "onnx/model.onnx"}:
            if not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns):
                (tmp_path / file).parent.mkdir(exist_ok=True)
                (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    folder = encoder_folder("somebody/some-encoder")
    got = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert got == {*fetched, "config.json"}
