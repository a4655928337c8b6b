"""Whole runs over a tiny random encoder: kills, reruns, determinism, the product. Real passages under MiniLM are .ci/run's own step."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from refine_fast.cli import main
from refine_fast.pipeline import RunConfig, engine, run
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.context import RunContext
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.stages.chunk import cut_corpus
from refine_fast.pipeline.training import batches, trainer
from refine_fast.pipeline.training.loss import BatchLoss
from refine_fast.pipeline.training.memory import MINI_BATCH, activation_bytes

pytestmark = pytest.mark.usefixtures("one_thread")  # as in the killed runs

SMALL = {
    "batch_size": 8,
    "queries_per_chunk": 2,
    "chunk_tokens": 64,
    "curve": (0, 1),
    "band": (-0.9, 1),
    "precision": "fp32",
    "ood": (),
}
STAGES = [
    "chunk",
    "query",
    "embed",
    "mine",
    "train",
    "score BM25",
    "score 0.0",
    "score 0.35",
    "score 1.0",
    "fuse",
    "report",
]
ALL = [*STAGES, "score 0.5"]


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pages of the Python language reference."""
    folder = tmp_path_factory.mktemp("docs")
    for name in sorted(topics)[:30]:
        (folder / f"{name}.md").write_text(topics[name][:600], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Path, docs: Path) -> Path:
    """An uninterrupted run, to copy and to compare with."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(RunConfig(out=out, docs=docs, model=str(tiny), **SMALL), console=Console(quiet=True))
    return out


def test_forgetting_is_checked_unasked(tiny: Path, docs: Path, tmp_path: Path) -> None:
    """On Python's documentation, which is not what was trained on."""
    out = tmp_path / "run"
    run(
        RunConfig(
            out=out,
            docs=docs,
            model=str(tiny),
            **{**SMALL, "ood": None, "ood_passages": 40, "max_steps": 1},
        ),
        console=Console(quiet=True),
    )
    [elsewhere] = json.loads((out / "report.json").read_text())["out_of_domain"]
    assert (elsewhere["name"], elsewhere["passages"]) == ("python-docs", 40)
    assert 30 <= elsewhere["queries"] <= 40
    assert "Out of domain (python-docs)" in (out / "report.md").read_text()


def test_no_chunk_is_longer_than_the_encoder_reads(tiny: Path, docs: Path, tmp_path: Path) -> None:
    encoder = load_encoder(tiny)
    config = RunConfig(
        out=tmp_path, docs=docs, model=str(tiny), chunk_tokens=encoder.max_seq_length * 2
    )
    _, chunks, _ = cut_corpus(RunContext(config, tiny, Console(quiet=True)))
    longest = max(len(encoder.tokenizer(chunk.passage)["input_ids"]) for chunk in chunks)
    assert encoder.max_seq_length / 2 < longest <= encoder.max_seq_length


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def outputs(out: Path) -> dict[str, dict[str, str]]:
    """Stage -> output -> SHA-256."""
    return {
        stage: record["outputs"]
        for stage, record in json.loads((out / "manifest.json").read_text()).items()
    }


def go_on(out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, str]:
    """Runs the command again over its folder; stage -> why it was redone."""
    assert main(["run", "--out", str(out), *flags]) == 0
    lines = [
        line.split(": ", 1)
        for line in capsys.readouterr().err.splitlines()
        if line.startswith(tuple(f"{name}: " for name in ALL))
    ]
    return {
        stage: reason
        for stage, reason in lines
        if reason != "up to date" and not reason.startswith("done in")
    }


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
    assert go_on(copied, capsys) == {}


@pytest.mark.parametrize(
    ("flags", "redone"),
    [
        (
            ["--weight=0.5"],
            {
                "score 0.5": "not done yet",
                "fuse": "scores-0.35.json changed",
                "report": "scores-0.35.json changed",
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
    why = go_on(copied, capsys, *flags)
    for stage, reason in redone.items():
        assert reason in why[stage]
    first = next(iter(redone))
    assert not set(STAGES[: STAGES.index(first)] if first in STAGES else STAGES[:8]) & why.keys()


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


def _killed(config: RunConfig, at: str) -> None:
    """A run that kills itself in stage ``at``: when its work is written and nothing of it is recorded; training in its eighth step."""
    from transformers import TrainerCallback

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    trainer.CHECKPOINT_SECONDS = 0.0
    sync, work_of = engine.fsync_all, engine.RunFolder.do
    current = ""

    def do(self: engine.RunFolder, stage: engine.Stage) -> float:
        nonlocal current
        current = stage.name
        return work_of(self, stage)

    def sync_or_die(path: Path) -> None:
        if current == at:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    def die(self: TrainerCallback, args, state, control, **kwargs) -> None:
        if at == "train" and state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    engine.RunFolder.do, engine.fsync_all, TrainerCallback.on_step_begin = do, sync_or_die, die
    run(config, console=Console(quiet=True))


def test_kill_9_in_each_stage(tmp_path: Path, tiny: Path, docs: Path, whole: Path) -> None:
    """A chain of runs over one folder, each killed one stage further on: what they leave in the end has the very bytes of the run that was
    never interrupted. Training is killed between two checkpoints, so this is also the equality of a resumed training."""
    config = RunConfig(out=tmp_path / "run", docs=docs, model=str(tiny), **SMALL)
    for stage in STAGES:
        kill_at(stage, config)
        done = outputs(config.out) if (config.out / "manifest.json").exists() else {}
        assert list(done) == STAGES[: STAGES.index(stage)]
    run(config, console=Console(quiet=True))
    assert outputs(config.out) == outputs(whole)


def kill_at(stage: str, config: RunConfig) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["refine_fast.pipeline.runner", "sentence_transformers", "datasets"]
    )
    process = processes.Process(target=_killed, args=(config, stage))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    if stage == "train":
        assert list((config.out / ".work").rglob("checkpoint-6/complete"))


def test_fusion_of_embeddings(
    copied: Path, whole: Path, tiny: Path, docs: Path, tmp_path: Path, capsys
) -> None:
    """Over the folder of a run with the other fusion, what the loss decides is redone; killed in training and in the assembly, it ends with
    the same bytes. The product is the sum of the two encoders under every command."""
    killed = RunConfig(
        out=shutil.copytree(copied, tmp_path / "killed"),
        docs=docs,
        model=str(tiny),
        fusion="embeddings",
        **SMALL,
    )
    why = go_on(copied, capsys, "--fusion=embeddings")
    assert 'config.fusion "weights" -> "embeddings"' in why["train"]
    assert list(why) == ["train", "score 0.35", "score 1.0", "fuse", "report"]
    assert outputs(copied)["train"]["tuned"] != outputs(whole)["train"]["tuned"]  # another loss
    for stage in ("train", "fuse"):
        kill_at(stage, killed)
    run(killed, console=Console(quiet=True))
    assert outputs(killed.out) == outputs(copied)

    texts = ["a river in France", "the boiling point of water"]
    tuned, frozen, product = (
        load_encoder(folder).encode_query(texts)
        for folder in (copied / "tuned", tiny, copied / "model")
    )
    mixed = 0.35 * tuned + 0.65 * frozen
    torch.testing.assert_close(
        product, mixed / np.linalg.norm(mixed, axis=1, keepdims=True), rtol=0, atol=2e-7
    )  # sums of float32
    report = json.loads((copied / "report.json").read_text())
    assert report["fusion"] == "embeddings"
    assert "normalize(0.35 * e_tuned + 0.65 * e_frozen)" in (copied / "report.md").read_text()
    assert "trust_remote_code=True" in (copied / "model" / "README.md").read_text()
    assert main(["index", str(copied)]) == 0

    assert go_on(copied, capsys) == {}
    assert (
        "config.weight 0.35 -> 1.0" in go_on(copied, capsys, "--weight=1")["train"]
    )  # it is in the loss
    assert (
        main(["plan", "--out", str(tmp_path / "more"), str(docs), "--model", str(copied / "model")])
        == 2
    )
    assert (
        "holds two encoders (fusion embeddings); adapt its subfolder tuned or frozen instead."
        in capsys.readouterr().err
    )


def test_the_seed_decides(tmp_path: Path, tiny: Path, docs: Path, whole: Path) -> None:
    """The same seed again gives the same bytes (test_kill_9_in_each_stage); another one does not."""
    run(
        RunConfig(out=tmp_path / "run", docs=docs, model=str(tiny), **{**SMALL, "seed": 1}),
        console=Console(quiet=True),
        until="train",
    )
    other = outputs(tmp_path / "run")
    assert other["query"] != outputs(whole)["query"]
    assert other["train"] != outputs(whole)["train"]


def test_two_runs_into_one_folder(copied: Path, capsys) -> None:
    with engine.RunFolder(copied):
        assert main(["run", "--out", str(copied)]) == 3
    assert (
        f"is in use by another process ({os.getpid()}); wait for it to finish or give another --out."
        in capsys.readouterr().err
    )


def test_ctrl_c(copied: Path, monkeypatch, capsys) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("refine_fast.pipeline.stages.mine.mine", lambda *a, **k: interrupt())
    assert main(["mine", "--out", str(copied), "--skip", "4"]) == 130
    assert "stopped; run the same command to resume." in capsys.readouterr().err


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
        f"error: model: {docs} holds neither config.json nor modules.json; give the folder of an encoder."
        in capsys.readouterr().err
    )


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


def test_a_batch_counts_every_document_once(tiny: Path) -> None:
    """Two queries share document 3, and 3 and 5 both answer the first: nothing that answers a query is its negative."""
    examples = [
        batches.Example("a", 3, (7,), frozenset({3, 5}), 0),
        batches.Example("b", 3, (5, 7), frozenset({3}), 1),
        batches.Example("c", 5, (), frozenset({5}), 2),
    ]
    batch = batches.Collator(load_encoder(tiny), examples, [f"document {i}" for i in range(9)])(
        [{"row": i} for i in range(3)]
    )
    assert batch["label"].tolist() == [0, 0, 2]  # the columns are 3, 7, 5
    assert len(batch["document_input_ids"]) == 3
    groups = batch["document_group"].tolist()
    assert groups[0] == groups[2] != groups[1]


def test_gradient_caching_changes_nothing_but_memory(tiny: Path) -> None:
    """Three sequences at a time give the gradients of the whole batch, in float64, where the order of the sums does not show."""
    pages = [topics[name][:300] for name in sorted(topics)[:8]]
    examples = [
        batches.Example(page[:60], i, ((i + 1) % 8,), frozenset({i}), i)
        for i, page in enumerate(pages)
    ]
    gradients = []
    for mini_batch in (None, 3):
        model = load_encoder(tiny).double().eval()  # without dropout, whose draws would differ
        batch = batches.Collator(model, examples, pages)([{"row": i} for i in range(8)])
        sides = [
            {k.removeprefix(f"{side}_"): v for k, v in batch.items() if k.startswith(f"{side}_")}
            for side in ("query", "document")
        ]
        BatchLoss(model, 0.05, mini_batch)(sides, batch["label"]).backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(grad.abs().max() for grad in gradients[0].values())
    assert largest > 1e-5
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-6, atol=float(1e-8 * largest))


def test_a_memory_budget(copied: Path, capsys) -> None:
    assert main(["train", "--out", str(copied), "--memory", "512MB"]) == 2
    assert (
        "error: memory: 0.5 GB is too little for this encoder; give at least 0.9GB."
        in capsys.readouterr().err
    )
    assert main(["train", "--out", str(copied), "--memory", "919MB"]) == 0
    assert (
        " sequences at a time, gradients cached, in fp32: about 0.9 GB of memory"
        in capsys.readouterr().err
    )
    assert main(["train", "--out", str(copied), "--memory", "2GB"]) == 0
    assert (
        "all 24 sequences of a batch at once, in fp32: about 0.9 GB of memory"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("words", [60, 300])
def test_the_plan_counts_what_the_backward_keeps(minilm: Path, words: int, bf16: bool) -> None:
    """Of the text, not of the longest that the encoder reads. By hand, for each of BERT's layers and tokens (Korthikanti et al. 2022, arXiv
    2205.05198, section 4.1, without dropout, with attention that keeps no scores): the inputs of two layer norms in float32; the inputs of
    the four products, q, k, v and both sides of the activation; the input of q, k and v narrowed for each of them. Left out, at most 6%:
    the softmax's sums, embeddings, masks, pooling."""
    model, text, width = load_encoder(minilm), "house " * words, 2 if bf16 else 4
    tokens = model.preprocess([text])["input_ids"].shape[1]
    assert tokens == min(words + 2, 256)
    by_hand = tokens * 6 * (2 * 384 * 4 + ((6 + 2 * bf16) * 384 + 2 * 1536) * width)
    assert by_hand <= activation_bytes(model, text, bf16=bf16) <= 1.06 * by_hand


def test_weight_auto_chooses_on_documents_of_their_own(copied: Path, capsys) -> None:
    assert main(["run", "--out", str(copied), "--weight", "auto", "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["weight"] in (0.0, 1.0)  # the curve of these runs
    assert "dev" not in result["sets"]
    files = ("queries.jsonl", "dev.jsonl", "held_out.jsonl")
    sources = [
        {json.loads(line)["chunk_id"].split("#")[0] for line in (copied / name).open()}
        for name in files
    ]
    assert all(sources)
    assert not sources[0] & sources[1]
    assert not sources[1] & sources[2]


def test_index_finds_what_the_model_finds(copied: Path, capsys) -> None:
    import faiss

    assert main(["index", str(copied)]) == 0
    index = faiss.read_index(str(copied / "index" / "vectors.faiss"))
    ids = json.loads((copied / "index" / "ids.json").read_text())
    chunks = [json.loads(line) for line in (copied / "chunks.jsonl").open()]
    assert ids == [chunk["id"] for chunk in chunks]
    from refine_fast.pipeline.encoder.encode import encode

    passage = f"{chunks[5]['title']} {chunks[5]['text']}"
    vector = encode(load_encoder(copied / "model"), [passage], role="document")
    assert index.search(vector, 1)[1][0, 0] == 5


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
        "--json",
        "--quiet",
    ]
    assert main(["plan", str(docs), "--out", str(tmp_path / "run"), *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    assert plan["chunks"] == sum(1 for _ in (whole / "chunks.jsonl").open())
    assert plan["training_queries"] == sum(1 for _ in (whole / "queries.jsonl").open())
    assert plan["steps"] == json.loads((whole / "training.json").read_text())["steps"]
    assert plan["mini_batch"] == MINI_BATCH
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


def test_doctor(tiny: Path, docs: Path, capsys) -> None:
    assert main(["doctor", "--model", str(tiny), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["encoder"] == {
        "works": True,
        "found": f"{tiny}: 32 dimensions, 96 tokens, prompts: query, document",
    }
    assert main(["doctor", "--model", str(docs), "--quiet"]) == 2


def test_a_stage_reads_no_setting_that_it_does_not_declare(
    tmp_path: Path, tiny: Path, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a change of that setting would not be seen. Folders and files are declared as such."""
    names = RunConfig.model_fields.keys()
    as_files = {"out", "docs", "model", "queries", "ood"}
    read: set[str] = set()
    undeclared: dict[str, set[str]] = {}
    plain, do = RunConfig.__getattribute__, engine.RunFolder.do

    def recorded(self: RunConfig, name: str) -> object:
        # A dump reads every field by way of __dict__.
        read.update(names if name == "__dict__" else [name])
        return plain(self, name)

    def watched(self: engine.RunFolder, stage: engine.Stage) -> float:
        read.clear()
        seconds = do(self, stage)
        choice = {"weight", "curve"} if "choose" in stage.facts or stage.name == "fuse" else set()
        undeclared[stage.name] = (read & names) - as_files - choice - stage.settings.keys()
        return seconds

    monkeypatch.setattr(RunConfig, "__getattribute__", recorded)
    monkeypatch.setattr(engine.RunFolder, "do", watched)
    settings = {**SMALL, "ood": None, "ood_passages": 40, "max_steps": 1, "weight": "auto"}
    config = RunConfig(out=tmp_path / "run", docs=docs, model=str(tiny), **settings)
    run(config, console=Console(quiet=True))
    assert undeclared == dict.fromkeys(undeclared, set())
