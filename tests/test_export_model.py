"""The product as a graph, run by the libraries that it is for."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import BERT, ENCODERS, QWEN3, T5, Make, layered

from refine_fast.arguments import MODEL_FORMATS
from refine_fast.cli import main
from refine_fast.pipeline.artifacts import CHUNKS, DEV, HELD_OUT, MODEL
from refine_fast.pipeline.commands import export_model
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import read_records, write_records
from refine_fast.pipeline.encoder.encode import encode
from refine_fast.pipeline.encoder.load import load_encoder

pytest.importorskip("onnxscript", reason="needs onnx: pip install '.[onnx]'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a pump", "Where does the BOILER of the harbour stand? " * 20, "the mill rests", ""]

PROMPTS = {"query": "find: ", "document": "title: none | text:\n"}

T5_DENSE = layered(T5, "mean", "dense", "normalize", prompts=PROMPTS)
"""Relative positions, and a module with weights behind the pooling."""

CAUSAL_DOT = layered(
    QWEN3,
    "lasttoken",
    dtype=torch.bfloat16,
    similarity_fn_name="dot",
    truncate_dim=16,
    prompts=PROMPTS,
)
"""Vectors of any length, cut to fewer dimensions."""


def run_of(make: Make, folder: Path, minilm: Path, seed: int = 0) -> Path:
    """What a finished run over an encoder leaves, as far as an export reads it."""
    torch.manual_seed(seed)
    run = folder / "run"
    run.mkdir()
    make(run / MODEL, minilm)
    passages = [f"The pump of mill {i} takes {i} tonnes a day. " * (1 + i) for i in range(20)]
    write_records(
        run / CHUNKS,
        [Chunk(f"d{i}", text, "pump", f"d{i}", 0, len(text)) for i, text in enumerate(passages)],
    )
    write_records(run / DEV, [])
    write_records(run / HELD_OUT, [])
    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A run with its graph."""
    run = run_of(T5_DENSE, tmp_path_factory.mktemp("exported"), minilm)
    export(run, "onnx")
    return run


def export(run: Path, format: str, *flags: str) -> Path:
    assert main(["export", str(run), "--format", format, "--quiet", *flags]) == 0
    return run / "export" / format


def embed(folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """By the code in the folder's README."""
    (code,) = re.findall(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    return names["embed"](texts)


def expected(run: Path, role: str) -> tuple[list[str], np.ndarray]:
    """Texts with their prompt, and the encoder's vectors of them."""
    model = load_encoder(run / MODEL)
    prompt = model.prompts.get(role) or ""
    return [prompt + text for text in TEXTS], encode(model, TEXTS, role=role, bf16=False)


def test_the_command_line_knows_every_format() -> None:
    assert set(MODEL_FORMATS) == set(export_model.FORMATS)


def test_a_causal_encoder_under_the_dot_product(
    tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(CAUSAL_DOT, tmp_path, minilm)
    folder = export(run, "onnx")
    for role in ("query", "document"):
        texts, vectors = expected(run, role)
        found = embed(folder, texts, monkeypatch)
        assert found.dtype == np.float32
        assert found.shape == (len(TEXTS), 16)
        assert np.linalg.norm(vectors, axis=1).min() > 1.5
        np.testing.assert_allclose(found, vectors, atol=1e-5 * np.abs(vectors).max())
        assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    assert "to vectors." in (folder / "README.md").read_text()


def test_what_sentence_transformers_reads(exported: Path) -> None:
    """The tokens' vectors, which it pools itself; every file but the weights; one text as many."""
    import onnxruntime

    folder = exported / "export" / "onnx"
    here, there = (
        {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        for root in (exported / MODEL, folder)
    )
    assert here - there == {"model.safetensors"}
    model = load_encoder(exported / MODEL)
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"))
    assert [put.name for put in session.get_inputs()] == ["input_ids", "attention_mask"]
    for texts in (TEXTS[:1], TEXTS[:3]):
        features = model[0].preprocess(texts)
        inputs = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
        names = [put.name for put in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, inputs), strict=True))
        assert names[0] == "last_hidden_state"
        with torch.no_grad():
            tokens = model[0](features)["token_embeddings"].numpy()
        real = inputs["attention_mask"] > 0
        np.testing.assert_allclose(outputs["last_hidden_state"][real], tokens[real], atol=1e-5)


@pytest.mark.parametrize("role", ["query", "document"])
def test_the_readme(exported: Path, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code gives the encoder's vectors with the prompts that it names."""
    folder = exported / "export" / "onnx"
    texts, vectors = expected(exported, role)
    np.testing.assert_allclose(embed(folder, texts, monkeypatch), vectors, atol=1e-5)
    text = (folder / "README.md").read_text()
    assert "- Put `'find: '` before a query and `'title: none | text:\\n'` before a doc" in text
    assert "cuts a text after 96 tokens" in text


def test_sentence_transformers_loads_the_folder(exported: Path) -> None:
    pytest.importorskip(
        "optimum.onnxruntime", reason="needs optimum-onnx, which requires transformers < 4.58"
    )
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported / "export" / "onnx"), backend="onnx")
    np.testing.assert_allclose(model.encode_query(TEXTS), expected(exported, "query")[1], atol=1e-5)


def test_openvino(tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install '.[openvino]'")
    run = run_of(ENCODERS["E5"], tmp_path, minilm)
    texts, vectors = expected(run, "query")
    folder = export(run, "openvino")
    np.testing.assert_allclose(embed(folder, texts, monkeypatch), vectors, atol=1e-5)
    assert [path.name for path in folder.rglob("*.onnx")] == []


def test_int8_states_its_loss(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(copied), "--format", "int8", "--json", "--quiet"]) == 0
    facts = json.loads(capsys.readouterr().out)
    folder = copied / "export" / "int8"
    asked = sum(len((copied / name).read_text().splitlines()) for name in (DEV, HELD_OUT))
    assert facts["loss"]["queries"] == asked > 0
    assert facts["loss"]["passages"] == len(read_records(copied / CHUNKS, Chunk))
    assert 0.9 < facts["cosine"] < 0.99999
    for metric, values in facts["loss"]["metrics"].items():
        row = f"| {metric} | {values['before']:.3f} | {values['after']:.3f} | "
        assert row in (folder / "README.md").read_text()
        assert values["change"]["mean"] == pytest.approx(values["after"] - values["before"])
    before = load_encoder(copied / MODEL)
    texts = [(before.prompts["query"] or "") + text for text in TEXTS]
    theirs, ours = encode(before, TEXTS, role="query"), embed(folder, texts, monkeypatch)
    assert (theirs * ours).sum(1).min() > 0.9
    whole = (copied / MODEL / "model.safetensors").stat().st_size
    assert (folder / "onnx" / "model.onnx").stat().st_size < 0.4 * whole


def test_vectors_that_differ_leave_nothing(
    exported: Path, tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The graph of other weights."""
    graph = (exported / "export" / "onnx" / "onnx" / "model.onnx").read_bytes()
    run = run_of(T5_DENSE, tmp_path, minilm, seed=1)
    monkeypatch.setattr(export_model, "write_onnx", lambda model, path: path.write_bytes(graph))
    assert main(["export", str(run), "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert "the onnx graph's vectors differ from the encoder's by" in error
    assert "and at most 1e-05 is allowed, so nothing was written; serve" in error
    assert list((run / "export").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Router", "this one reads texts with a Router"),
        ("static", "this one reads texts with a StaticEmbedding"),
        ("prompt", "this one leaves its prompt out of pooling"),
    ],
)
def test_encoders_that_are_no_graph(
    kind: str, reason: str, tmp_path: Path, minilm: Path, capsys
) -> None:
    def prompt(folder: Path, minilm: Path) -> None:
        ENCODERS["E5"](folder, minilm)
        config = folder / "1_Pooling" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"include_prompt": False}))

    run = run_of({**ENCODERS, "prompt": prompt}[kind], tmp_path, minilm)
    assert main(["export", str(run), "--format", "onnx"]) == 2
    assert reason in capsys.readouterr().err
    assert not (run / "export").exists()


def test_a_missing_package_names_its_extra(
    tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = run_of(BERT, tmp_path, minilm)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(run), "--format", "int8"]) == 2
    message = "export: int8 needs the package onnxscript; pip install 'refine-fast[onnx]'."
    assert message in capsys.readouterr().err
    assert list((run / "export").iterdir()) == []


def test_a_run_without_passages(copied: Path, capsys) -> None:
    (copied / "chunks.jsonl").write_bytes(b"")
    assert main(["export", str(copied), "--format", "onnx"]) == 2
    assert "chunks.jsonl holds no passages; make it again" in capsys.readouterr().err
    assert not (copied / "export").exists()


def test_a_run_without_a_product(copied: Path, tmp_path: Path, capsys) -> None:
    (copied / MODEL).rename(tmp_path / "gone")
    assert main(["export", str(copied), "--format", "int8"]) == 2
    assert "has no model; finish the run first: refine-fast run --out" in capsys.readouterr().err
