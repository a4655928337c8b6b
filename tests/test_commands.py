"""The command line over a finished run: what each command shows, writes and refuses."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from refine_fast.cli import main
from refine_fast.pipeline.config_file import saved_config
from refine_fast.pipeline.evaluation.general_knowledge import general_knowledge

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the killed runs


@pytest.mark.parametrize(
    ("command", "fact"),
    [("queries", "chunks"), ("mine", "band"), ("train", "steps"), ("report", "sets")],
)
def test_every_stage_has_a_command(copied: Path, capsys, command: str, fact: str) -> None:
    assert main([command, "--out", str(copied), "--json"]) == 0
    captured = capsys.readouterr()
    assert fact in json.loads(captured.out)
    assert "not done yet" not in captured.err
    assert main([command, "--out", str(copied)]) == 0
    assert {"sets": "recall@3"}.get(fact, fact) in capsys.readouterr().out


def test_json_on_stdout(copied: Path, capsys) -> None:
    assert main(["run", "--out", str(copied), "--json", "--quiet"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["weight"] == 0.35
    assert result["report"] == str(copied / "report.html")
    assert set(result["sets"]["in_domain"]["systems"]) == {"BM25", "base", "fine-tuned", "fused"}
    assert captured.err == ""


@pytest.mark.parametrize("package", ["openai", "json_repair"])
def test_what_reads_a_run_needs_no_extra_of_its_making(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """A run with a language model is searched and exported without the extra llm."""
    run = shutil.copytree(indexed, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    asked = config.replace("llm: null", "llm: http://localhost:1/v1")
    (run / "config.yaml").write_text(asked.replace("llm_model: []", "llm_model: [m]"))
    assert saved_config(run).llm_model == ("m",)
    for name in [name for name in sys.modules if "pipeline.queries.llm" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["search", str(run), "a river", "--quiet"]) == 0
    assert main(["export", str(run), "--format", "triplets", "--quiet"]) == 0


def test_a_command_in_a_message_can_be_pasted(tmp_path: Path, capsys) -> None:
    (out := tmp_path / "my run").mkdir()
    for command in (["index", str(out)], ["export", str(out), "--format", "onnx"]):
        assert main(command) == 2
        assert f"first: refine-fast run --out '{out}'." in capsys.readouterr().err
    assert main(["export", str(out), "--format", "faiss"]) == 2
    assert f"make one: refine-fast index '{out}'." in capsys.readouterr().err


@pytest.mark.parametrize("spoil", ["empty", "binary"])
def test_documents_without_text(tmp_path: Path, tiny: Path, spoil: str, capsys) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "page.md").write_bytes(b"" if spoil == "empty" else bytes(range(256)) * 40)
    assert main(["run", str(folder), "--model", str(tiny), "--out", str(tmp_path / "run")]) == 2
    assert f"error: {folder} holds no usable text" in capsys.readouterr().err


def test_a_folder_that_is_no_encoder(tmp_path: Path, docs: Path, capsys) -> None:
    assert main(["run", str(docs), "--model", str(docs), "--out", str(tmp_path / "run")]) == 2
    assert (
        f"error: model: {docs} holds neither config.json nor modules.json; "
        "give the folder of an encoder." in capsys.readouterr().err
    )


def test_eval_names_its_models_whole(whole: Path, tiny: Path, tmp_path: Path, capsys) -> None:
    """At 80 columns: two runs' models differ in the middle of their paths."""
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("q\td0\t1\n")
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": f"river {i}"}) + "\n" for i in range(3))
    )
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "river 0"}))
    models = [str(tiny), str(whole / "model")]
    assert main(["eval", *models, "--data", str(tmp_path)]) == 0
    cells = [
        line.split("│")[1].strip()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    assert "".join(cells) == "BM25" + "".join(models)


def test_plan_writes_nothing(tmp_path: Path, tiny: Path, docs: Path, whole: Path, capsys) -> None:
    flags = [
        "--model",
        str(tiny),
        "--queries-per-chunk",
        "2",
        "--chunk-tokens",
        "64",
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--json",
        "--quiet",
    ]
    assert main(["plan", str(docs), "--out", str(tmp_path / "run"), *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    assert plan["chunks"] == sum(1 for _ in (whole / "chunks.jsonl").open())
    assert plan["training_queries"] == sum(1 for _ in (whole / "queries.jsonl").open())
    assert plan["steps"] == json.loads((whole / "training.json").read_text())["steps"]
    sets = 2 * len(general_knowledge("test").docs)  # passages with a question each
    assert main(["plan", str(docs), "--out", str(tmp_path / "run"), "--ood", "none", *flags]) == 0
    without = json.loads(capsys.readouterr().out)
    assert plan["passages_encoded"] == without["passages_encoded"] + 3 * sets
    assert plan["mini_batch"] == 16  # half of the machine's memory holds a batch, negatives too
    assert 0.88 < plan["training_gb"] < 1


def test_too_few_queries(tmp_path: Path, tiny: Path, docs: Path, capsys) -> None:
    """plan refuses what run would refuse later."""
    query = {
        "text": "which document answers this?",
        "doc_id": min(path.name for path in docs.iterdir()),
    }
    (tmp_path / "queries.jsonl").write_text(json.dumps(query))
    flags = [
        str(docs),
        "--out",
        str(tmp_path / "run"),
        "--model",
        str(tiny),
        "--queries",
        str(tmp_path / "queries.jsonl"),
        "--quiet",
    ]
    for command in ("plan", "run"):
        assert main([command, *flags]) == 2
        assert (
            "queries: 0 left to train on, too few to learn from; give more documents or --queries."
            in capsys.readouterr().err
        )


@pytest.mark.usefixtures("no_cluster")
def test_doctor(tiny: Path, docs: Path, capsys) -> None:
    assert main(["doctor", "--model", str(tiny), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["encoder"] == {
        "works": True,
        "found": f"{tiny}: 32 dimensions, 96 tokens, prompts: query, document, cosine similarity",
    }
    assert main(["doctor", "--model", str(docs), "--quiet"]) == 2


def test_an_export_to_a_folder_that_is_not_writable(whole: Path, capsys) -> None:
    """As another user where root runs it, who may write everywhere."""
    me = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # others see it, unlike tmp_path
        folder = Path(name)
        folder.chmod(0o755)
        run = shutil.copytree(whole, folder / "run")
        flags = ["export", str(run), "--format", "triplets", "--out"]
        assert main([*flags, str(folder / "a.jsonl")]) == 0  # and nothing is left to import
        folder.chmod(0o555)
        try:
            os.seteuid(65534 if me == 0 else me)
            assert main([*flags, str(folder / "b.jsonl")]) == 1
        finally:
            os.seteuid(me)
            folder.chmod(0o755)
    assert "Permission denied" in capsys.readouterr().err
