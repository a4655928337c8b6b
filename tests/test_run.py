"""Whole runs over a tiny random encoder: what is left, what is redone and why. Real passages under
MiniLM are a step of .ci/run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scrambled import ScrambledWorkers
from small_runs import SMALL, STAGES, outputs, rerun, undeclared_settings

import refine_fast as rf
from refine_fast.cli import KEPT_BASE, main
from refine_fast.errors import RefineFastError
from refine_fast.pipeline import RunConfig, run
from refine_fast.pipeline.artifacts import (
    base_embeddings,
    base_sentences,
    curve_file,
    relevant_rows,
    score_file,
    training_view,
)
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.context import RunContext
from refine_fast.pipeline.encoder import encode
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.engine import RunFolder
from refine_fast.pipeline.evaluation.general_knowledge import general_knowledge
from refine_fast.pipeline.stages import run_stages, systems
from refine_fast.pipeline.stages.chunk import cut_corpus

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the killed runs


def test_forgetting_is_checked_unasked(tiny: Path, docs: Path, tmp_path: Path) -> None:
    """On general knowledge."""
    out = tmp_path / "run"
    run(
        RunConfig(
            out=out,
            docs=docs,
            model=str(tiny),
            **{**SMALL, "ood": None, "max_steps": 1},
        ),
        console=Console(quiet=True),
    )
    [elsewhere] = json.loads((out / "report.json").read_text())["out_of_domain"]
    assert elsewhere["name"] == "general knowledge"
    assert elsewhere["queries"] == elsewhere["passages"] == len(general_knowledge("test").docs)
    assert "Out of domain (general knowledge)" in (out / "report.md").read_text()


def test_the_extra_pipeline_is_enough(tiny: Path, docs: Path, tmp_path: Path) -> None:
    """A run without a language model needs no package of another extra."""
    others = "openai json_repair py3langid pypdf chardet docx pptx openpyxl peft triton pytest ray"
    options = f"--model {tiny} --out {tmp_path / 'run'} --max-steps 1 --weight 0.35 --curve 0,1"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({others.split()}))  # None: importing it fails
from refine_fast.cli import main
raise SystemExit(main(["run", {str(docs)!r}, "--ood", "none", "--quiet", *{options.split()}]))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_no_chunk_is_longer_than_the_encoder_reads(tiny: Path, docs: Path, tmp_path: Path) -> None:
    encoder = load_encoder(tiny)
    config = RunConfig(
        out=tmp_path, docs=docs, model=str(tiny), chunk_tokens=encoder.max_seq_length * 2
    )
    _, chunks, _ = cut_corpus(RunContext(config, tiny, Console(quiet=True)))
    longest = max(len(encoder.tokenizer(chunk.passage)["input_ids"]) for chunk in chunks)
    assert encoder.max_seq_length / 2 < longest <= encoder.max_seq_length


def test_the_run_folder(whole: Path) -> None:
    assert list(outputs(whole)) == STAGES
    for name in (
        "model",
        "tuned",
        "report.md",
        "report.json",
        "report.html",
        "figures",
        "queries.jsonl",
        "negatives.jsonl",
        "config.yaml",
    ):
        assert (whole / name).exists()
    assert list((whole / ".work").iterdir()) == []


def test_the_product_is_the_base_but_for_its_weights(whole: Path, tiny: Path) -> None:
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    base, tuned, fused = (
        load_file(folder / "model.safetensors")
        for folder in (tiny, whole / "tuned", whole / "model")
    )
    changed = [name for name in base if not torch.equal(base[name], tuned[name])]
    assert len(changed) > len(base) / 2
    for name in base:
        assert torch.equal(fused[name], torch.lerp(base[name], tuned[name], 0.35))
    model = SentenceTransformer(str(whole / "model"), device="cpu")
    assert model.prompts["query"] == "query: "
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert model[1].pooling_mode == "cls"
    AutoModel.from_pretrained(whole / "model")
    card = (whole / "model" / "README.md").read_text()
    assert "base_model: encoder" in card
    assert "| fused |" in card


def test_nothing_leaks_from_held_out_documents(whole: Path) -> None:
    def sources(name: str) -> set[str]:
        return {source_of[json.loads(line)["chunk_id"]] for line in (whole / name).open()}

    source_of = {
        row["id"]: row["source"] for row in map(json.loads, (whole / "chunks.jsonl").open())
    }
    trained, held = sources("queries.jsonl"), sources("held_out.jsonl")
    assert trained
    assert held
    assert not trained & held
    negatives = {
        n["chunk_id"]
        for line in (whole / "negatives.jsonl").open()
        for n in json.loads(line)["negatives"]
    }
    assert negatives
    assert not {source_of[chunk] for chunk in negatives} & held


def test_a_rerun_does_nothing(copied: Path, capsys) -> None:
    assert rerun(copied, capsys) == {}


@pytest.mark.parametrize(
    ("flags", "redone"),
    [
        (
            ["--weight=0.5"],
            {
                "curve 0.5": "not done yet",
                "choose": "config.weight 0.35 -> 0.5",
                "score fused": "fusion.json changed",
                "fuse": "fusion.json changed",
            },
        ),
        (["--skip=3"], {"mine": "config.skip 5 -> 3"}),
        (
            ["--held-out=0.3"],
            {"query": "config.held_out 0.2 -> 0.3", "embed": "queries.jsonl changed"},
        ),
    ],
)
def test_a_rerun_redoes_what_changed_and_says_why(
    copied: Path, capsys, flags: list[str], redone: dict[str, str]
) -> None:
    why = rerun(copied, capsys, *flags)
    for stage, reason in redone.items():
        assert reason in why[stage]
    first = next(iter(redone))
    before = STAGES.index(first) if first in STAGES else STAGES.index("curve 1.0")
    assert not set(STAGES[:before]) & why.keys()


def test_a_path_that_is_not_utf8(copied: Path, docs: Path, tmp_path: Path, capsys) -> None:
    """Its bytes are named in the report and in the manifest, which are UTF-8. A set is scored anew
    where a file changes that is read."""
    odd = shutil.copytree(docs, tmp_path / os.fsdecode(b"caf\xe9"))
    flags = ["--config", str(copied / "config.yaml"), str(odd)]
    assert set(rerun(copied, capsys, *flags)) == {"report"}
    report = json.loads((copied / "report.json").read_text())
    assert report["documents"]["source"].endswith(r"caf\xe9")
    beir = tmp_path / os.fsdecode(b"set \xe9")
    (beir / "qrels").mkdir(parents=True)
    (beir / "qrels" / "test.tsv").write_text("q\td0\t1\n")
    rows = (json.dumps({"_id": f"d{i}", "text": f"river {i}"}) + "\n" for i in range(3))
    (beir / "corpus.jsonl").write_text("".join(rows))
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "river 0"}))
    assert r"ood set \xe9 changed" in rerun(copied, capsys, "--ood", str(beir))["score base"]
    [elsewhere] = json.loads((copied / "report.json").read_text())["out_of_domain"]
    assert elsewhere["name"] == r"set \xe9"
    for name in ("README.md", "qrels/dev.tsv", "corpus.jsonl.gz"):
        (beir / name).touch()
    assert rerun(copied, capsys) == {}
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "river 1"}))
    assert "score BM25" in rerun(copied, capsys)
    queries = tmp_path / os.fsdecode(b"questions \xe9.jsonl")
    queries.touch()
    context = RunContext(RunConfig(out=copied, queries=queries), odd, Console())
    assert context.query_source == r"from questions \xe9.jsonl"


def test_a_document_that_changed(
    copied: Path, tiny: Path, docs: Path, tmp_path: Path, capsys
) -> None:
    changed = shutil.copytree(docs, tmp_path / "docs")
    page = sorted(changed.iterdir())[3]
    page.write_text(
        page.read_text() + "\nIt ends with a line of its own, which nobody has read before.\n"
    )
    assert (
        main(["run", str(changed), "--config", str(copied / "config.yaml"), "--out", str(copied)])
        == 0
    )
    lines = capsys.readouterr().err
    assert f"chunk: docs changed ({page.name})" in lines
    assert "query: chunks.jsonl changed" in lines


@pytest.mark.parametrize("flag", ["ood", "docs"])
def test_a_broken_retrieval_set_is_refused_before_any_work(
    tiny: Path, docs: Path, tmp_path: Path, flag: str
) -> None:
    """Not after the training, where it is scored."""
    broken = tmp_path / "broken"
    (broken / "qrels").mkdir(parents=True)
    lines = (json.dumps({"_id": f"d{i}", "text": f"text number {i}"}) + "\n" for i in range(9))
    (broken / "corpus.jsonl").write_text("".join(lines))
    (broken / "queries.jsonl").write_text("{not JSON\n")
    (broken / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    given = {"docs": docs, **SMALL, flag: (broken,) if flag == "ood" else broken}
    config = RunConfig(out=tmp_path / "run", model=str(tiny), **given)
    with pytest.raises(RefineFastError, match=r"queries.jsonl:1 is not JSON"):
        run(config, console=Console(quiet=True))
    assert not (config.out / "manifest.json").exists()


def test_a_model_card_that_changed(tiny: Path, docs: Path, tmp_path: Path) -> None:
    """A hub's README changes without the model: only the fused model's own card quotes it."""
    encoder = shutil.copytree(tiny, tmp_path / "encoder")
    config = RunConfig(out=tmp_path / "run", docs=docs, model=str(encoder), **SMALL)
    context = run(config, console=Console(quiet=True), until="embed")

    def reasons() -> dict[str, list[str]]:
        with RunFolder(config.out) as folder:
            return {stage.name: folder.reasons(stage) for stage in run_stages(context)}

    (encoder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert reasons()["chunk"] == reasons()["embed"] == []
    card = {stage.name: stage.files for stage in run_stages(context)}["fuse"]["model card"]
    assert card.read_text().startswith("---")
    (encoder / "modules.json").write_text((encoder / "modules.json").read_text() + "\n")
    assert reasons()["chunk"] == reasons()["embed"] == ["encoder changed (modules.json)"]


def test_a_run_to_a_stage(tmp_path: Path, tiny: Path, docs: Path) -> None:
    config = RunConfig(out=tmp_path / "run", docs=docs, model=str(tiny), **SMALL)
    with pytest.raises(ValueError, match=r"until must be one of chunk, .*report \(got 'mined'\)"):
        run(config, console=Console(quiet=True), until="mined")
    context = run(config, console=Console(quiet=True), until="chunk")
    with pytest.raises(RefineFastError, match="has no report yet"):
        _ = context.report


def test_the_seed_decides(tmp_path: Path, tiny: Path, docs: Path, whole: Path) -> None:
    """The same seed gives the same bytes (test_kill_9_in_each_stage); another one does not."""
    run(
        RunConfig(out=tmp_path / "run", docs=docs, model=str(tiny), **{**SMALL, "seed": 1}),
        console=Console(quiet=True),
        until="train",
    )
    other = outputs(tmp_path / "run")
    assert other["query"] != outputs(whole)["query"]
    assert other["train"] != outputs(whole)["train"]


def test_without_a_better_weight_the_base_is_delivered(
    copied: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training that changes nothing gains nothing: the interval holds 0."""
    command = ["run", "--out", str(copied), "--lr", "1e-9", "--weight", "auto", "--json"]
    assert main(command) == KEPT_BASE
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert (result["weight"], result["kept_base"]) == (0.0, True)
    assert "warning: The base model is kept: no fusion weight is shown to retrieve" in shown.err
    base, model = (load_file(folder / "model.safetensors") for folder in (tiny, copied / "model"))
    assert base.keys() == model.keys()
    assert all(torch.equal(base[name], model[name]) for name in base)
    report = json.loads((copied / "report.json").read_text())
    assert report["choice"]["refused"] == "not better"
    assert report["verdict"] == [result_of(shown.err)]
    assert "as it was" in (copied / "model" / "README.md").read_text()


def test_distillation_alone_trains_without_mined_negatives(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are mined, for an export; a number that is given is trained on."""
    why = rerun(copied, capsys, "--distill", "1")
    assert "config.negatives 1 -> 0" in why["train"]
    mined = [json.loads(line)["negatives"] for line in (copied / "negatives.jsonl").open()]
    assert max(map(len, mined)) == 1
    report = json.loads((copied / "report.json").read_text())
    assert report["mining"]["per_query"] == 0
    assert (
        "| hard negatives | none, in-batch negatives alone |" in (copied / "report.md").read_text()
    )
    why = rerun(copied, capsys, "--distill", "0.5")
    assert "config.negatives 0 -> 1" in why["train"]
    why = rerun(copied, capsys, "--distill", "1", "--negatives", "2")
    assert "config.negatives 1 -> 2" in why["train"]


def test_a_weight_of_1_is_scored_once(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the fine-tuned encoder, which it is."""
    why = rerun(copied, capsys, "--weight", "1")
    assert "score fused" in why
    assert "score fine-tuned" not in why
    assert not (copied / curve_file(0.35)).exists()  # of the weight before this one
    fused, tuned = (copied / score_file(system) for system in ("fused", "fine-tuned"))
    assert fused.read_bytes() == tuned.read_bytes() != (copied / score_file("base")).read_bytes()


def result_of(messages: str) -> str:
    """The verdict among the messages of a run that kept the base."""
    [line] = [line for line in messages.splitlines() if "The base model is kept" in line]
    return line.removeprefix("warning: ")


def test_the_weight_is_compared_on_documents_of_their_own(copied: Path) -> None:
    files = ("queries.jsonl", "dev.jsonl", "held_out.jsonl")
    sources = [
        {json.loads(line)["chunk_id"].split("#")[0] for line in (copied / name).open()}
        for name in files
    ]
    assert all(sources)
    assert not sources[0] & sources[1]
    assert not sources[1] & sources[2]


def test_the_gain_in_the_served_system_is_the_second_line(copied: Path, capsys) -> None:
    """Its passage vectors and its BM25 have the scores that the other stages give them."""
    why = rerun(copied, capsys, "--served", "yes")
    assert why["systems"] == "not done yet"
    report = json.loads((copied / "report.json").read_text())
    assert report["verdict"][1].startswith("Served, with sentences and BM25: ")
    served, judged = report["served"], report["in_domain"]
    assert (served["queries"], served["passages"]) == (judged["queries"], judged["passages"])
    at = {point["weight"]: point["metrics"] for point in judged["weights"]}
    for side, weight in (("base", 0), ("fused", 0.35)):
        systems = served["systems"][side]
        assert list(systems) == ["passages", "sentences", "BM25", "hybrid", "blend"]
        # A random encoder's similarities are so close that the last bits, which depend on the
        # batch that a text is encoded in, decide a few ranks.
        assert systems["passages"]["metrics"] == pytest.approx(at[weight], abs=0.08)
        assert systems["BM25"]["metrics"] == pytest.approx(judged["bm25"])
        assert served["choices"][side]["queries"] > 0
    assert "## The systems that can be served" in (copied / "report.md").read_text()


def test_workers_encode_for_the_served_system(
    copied: Path, tiny: Path, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCHES_PER_BLOCK", 1)
    monkeypatch.setattr(encode, "BLOCKS_PER_SHARD", 1)
    config = RunConfig(out=copied, docs=docs, model=str(tiny), **SMALL)
    texts = [json.loads(line)["text"] for line in (copied / "chunks.jsonl").open()][:80]
    workers, vectors = ScrambledWorkers(), []
    for shared in (None, workers):
        here = RunContext(config, tiny, Console(quiet=True), workers=shared)
        for side, weight in (("base", 0.0), ("fused", 0.35)):
            encoder = systems._Encoder(here, tmp_path, side, weight)
            vectors += [encoder.documents(texts), encoder.queries(texts[:9])]
            vectors.append(encoder.documents([*texts, "Another sentence."]))
    for plain, spread in zip(vectors[:6], vectors[6:], strict=True):
        np.testing.assert_array_equal(plain, spread)
    assert not np.array_equal(vectors[0], vectors[3])
    assert workers.done == {"document": 3, "query": 1}


def test_a_stage_reads_no_setting_that_it_does_not_declare(
    tmp_path: Path, tiny: Path, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a change of that setting would not be seen. Folders and files are declared as such."""
    undeclared = undeclared_settings(monkeypatch)
    settings = {**SMALL, "ood": None, "max_steps": 1, "weight": "auto", "served": True}
    settings["mine_by"] = "sentence"
    config = RunConfig(out=tmp_path / "run", docs=docs, model=str(tiny), **settings)
    run(config, console=Console(quiet=True))
    assert "report" in undeclared
    assert not any(undeclared.values()), undeclared


def test_negatives_by_the_best_sentence(copied: Path, capsys) -> None:
    """Their scores are the best sentence's. The sentences are encoded once, and only if asked."""
    before = (copied / "negatives.jsonl").read_bytes()
    mine = ["mine", "--out", str(copied), "--quiet", "--mine-by"]
    assert main([*mine, "sentence"]) == 0
    rows, offsets = base_sentences(copied)
    chunks, queries = training_view(copied)
    asked, _ = base_embeddings(copied)
    assert len(offsets) == len(chunks) + 1
    assert len(rows) > len(chunks)
    row = {chunk.id: i for i, chunk in enumerate(chunks)}
    best = rf.best_of_groups(asked, rows, offsets)
    relevant = relevant_rows(chunks, queries)
    lines = (copied / "negatives.jsonl").read_text(encoding="utf-8").splitlines()
    for i, record in enumerate(map(json.loads, lines)):
        ranked = best[i].argsort(descending=True).tolist()
        places = [place for place in ranked if place not in relevant[record["query"]]]
        found = [row[negative["chunk_id"]] for negative in record["negatives"]]
        assert best[i, found].tolist() == pytest.approx(best[i, places[5:6]].tolist(), abs=1e-6)
        scores = [negative["score"] for negative in record["negatives"]]
        assert scores == pytest.approx(best[i, found].tolist(), abs=2e-6)
    manifest = json.loads((copied / "manifest.json").read_text())
    assert main([*mine, "sentence", "--skip", "4"]) == 0
    again = json.loads((copied / "manifest.json").read_text())
    assert again["sentences"] == manifest["sentences"]
    assert again["mine"] != manifest["mine"]
    assert main([*mine, "passage", "--skip", "5"]) == 0
    assert (copied / "negatives.jsonl").read_bytes() == before


def test_more_negatives_than_passages(copied: Path) -> None:
    """Every passage in the band; memory for no more than there are."""
    assert main(["mine", "--out", str(copied), "--negatives", "2000000000", "--quiet"]) == 0
    lines = (copied / "negatives.jsonl").read_text(encoding="utf-8").splitlines()
    found = [len(json.loads(line)["negatives"]) for line in lines]
    assert 1 < max(found) < len((copied / "chunks.jsonl").read_text().splitlines())
