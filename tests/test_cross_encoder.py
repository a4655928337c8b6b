"""A cross-encoder as a teacher: its logits, its targets, the loss, the run with --teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import outputs, undeclared_settings

from refine_fast.cli import main
from refine_fast.errors import RefineFastError
from refine_fast.pipeline.artifacts import read_taught, relevant_rows, training_view
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import read_records
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.stages.train import _examples
from refine_fast.pipeline.training import cross_encoder
from refine_fast.pipeline.training.batches import Collator, Example
from refine_fast.pipeline.training.cross_encoder import load_cross_encoder, logits_of
from refine_fast.pipeline.training.loss import BatchLoss
from refine_fast.pipeline.training.teachers import Judged, Teachers

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = [topics[name][:300] for name in sorted(topics)[:8]]


def make_cross_encoder(
    folder: Path, tokenizer: Path, *, seed: int = 0, labels: int = 1, words: int = 30522
) -> Path:
    """A random BERT of one layer that scores pairs, with clearly different logits."""
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    others = {"intermediate_size": 32, "max_position_embeddings": 96, "num_labels": labels}
    config = BertConfig(vocab_size=words, initializer_range=0.5, **sizes, **others)
    model = BertForSequenceClassification(config)
    plain = folder / "plain"
    model.save_pretrained(plain)
    AutoTokenizer.from_pretrained(tokenizer, model_max_length=96).save_pretrained(plain)
    CrossEncoder(str(plain), device="cpu").save_pretrained(str(folder / "judge"))
    return folder / "judge"


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    return make_cross_encoder(tmp_path_factory.mktemp("judge"), minilm)


@pytest.fixture(scope="module")
def judged(whole: Path, judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the teacher, up to the fine-tuned encoder."""
    out = shutil.copytree(whole, tmp_path_factory.mktemp("judged") / "run")
    assert main(["train", "--out", str(out), "--teacher", str(judge), "--quiet"]) == 0
    return out


def taught(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "taught.jsonl").open()]


def interrupt_scoring(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C at the third call that scores pairs. Returns the pairs of each call, 0 for that."""
    scored: list[int] = []
    score = cross_encoder.pair_logits

    def counted(model: Any, pairs: Sequence[tuple[str, str]], **how: Any) -> np.ndarray:
        if len(scored) == 2:
            scored.append(0)
            raise KeyboardInterrupt
        scored.append(len(pairs))
        return score(model, pairs, **how)

    monkeypatch.setattr(cross_encoder, "pair_logits", counted)
    return scored


def test_the_logits_are_those_of_predict(judge: Path, tmp_path: Path, monkeypatch) -> None:
    """Whatever the batch, for the rows that the pairs name; with the sigmoid, they are what the
    model gives by default."""
    monkeypatch.setattr(cross_encoder, "BLOCK", 5)
    model = load_cross_encoder(judge)
    queries, pairs = [page[:40] for page in PAGES], [(i % 8, i * 3 % 7) for i in range(12)]
    found = logits_of(model, pairs, queries, PAGES, tmp_path / "logits.npy", bf16=False)
    alone = [model.predict((queries[q], PAGES[d])) for q, d in pairs]
    torch.testing.assert_close(torch.from_numpy(found).sigmoid(), torch.tensor(alone))
    assert found.std() > 0.1


def test_a_killed_scoring_resumes(judge: Path, tmp_path: Path, monkeypatch) -> None:
    """It scores the rest only, and the logits are those of one that was not killed."""
    monkeypatch.setattr(cross_encoder, "BLOCK", 4)
    model = load_cross_encoder(judge)
    pairs = [(i % 8, i * 3 % 7) for i in range(14)]
    whole = logits_of(model, pairs, PAGES, PAGES, tmp_path / "whole.npy", bf16=False)
    scored = interrupt_scoring(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        logits_of(model, pairs, PAGES, PAGES, tmp_path / "killed.npy", bf16=False)
    resumed = logits_of(model, pairs, PAGES, PAGES, tmp_path / "killed.npy", bf16=False)
    assert scored == [4, 4, 0, 4, 2]
    np.testing.assert_array_equal(resumed, whole)


def test_a_logit_that_is_not_a_number(judge: Path) -> None:
    model = load_cross_encoder(judge)
    model.transformers_model.classifier.bias.data.fill_(torch.nan)
    with pytest.raises(
        RefineFastError, match="teacher: the logit of a pair is NaN or infinite; give an"
    ):
        cross_encoder.pair_logits(model, [("a", "b")], bf16=False)


def test_the_targets() -> None:
    """In float64: softmax over the columns with a logit; in the order of the columns."""
    found = Judged([{4: 9.0, 1: -2.5, 0: 3.0}, {2: 1.0}], 2.0).targets([1, 0], [1, 2, 3, 4])
    known = np.exp(np.array([-2.5, 9.0]) / 2)
    expected = np.zeros((2, 4))
    expected[0, 1] = 1
    expected[1, [0, 3]] = known / known.sum()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("distill", [0.3, 1.0])
def test_the_loss_of_a_batch(tiny: Path, distill: float) -> None:
    """Against the formula, with the whole matrix, in float64; so are the gradients. Passage 5, a
    negative of query 1, has a logit for query 0 too; passage 9 is not in the batch."""
    examples = [
        Example(page[:60], i, ((i + 4) % 8,), frozenset({i}), i) for i, page in enumerate(PAGES[:4])
    ]
    logits = [{i: 0.5 * i, (i + 4) % 8: 1.5 - i} for i in range(4)]
    logits[0] |= {5: 1.0, 9: 3.0}
    model = load_encoder(tiny).double().eval()
    random = np.random.default_rng(0)
    q0, d0 = (F.normalize(torch.from_numpy(random.normal(size=(8, 6)))).numpy() for _ in range(2))
    teachers = Teachers(q0, d0, 0.05, None, Judged(logits, 0.7))
    assert teachers.names == ["frozen", "cross-encoder"]
    batch = Collator(model, examples, PAGES, teachers=teachers)([{"row": i} for i in range(4)])

    def sides() -> list[dict[str, Any]]:
        return [
            {k.removeprefix(f"{side}_"): v for k, v in batch.items() if k.startswith(f"{side}_")}
            for side in ("query", "document")
        ]

    for name in teachers.names:
        batch[f"query_targets_{name}"] = batch[f"query_targets_{name}"].double()
    found = BatchLoss(model, 0.05, distill=distill)(sides(), batch["label"])
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    q, d = (
        F.normalize(
            model({k: v for k, v in side.items() if k != "group" and "targets" not in k})[
                "sentence_embedding"
            ]
        )
        for side in sides()
    )
    # rows and columns as the collator orders them: the longest text first
    queries = sorted(range(4), key=lambda i: -len(examples[i].query))
    columns = sorted((0, 4, 1, 5, 2, 6, 3, 7), key=lambda i: -len(PAGES[i]))
    assert batch["label"].tolist() == [columns.index(i) for i in queries]
    judged = torch.zeros(4, 8, dtype=torch.float64)
    for row, i in enumerate(queries):
        known = {document: logit for document, logit in logits[i].items() if document < 8}
        shares = (torch.tensor(list(known.values()), dtype=torch.float64) / 0.7).softmax(0)
        judged[row, [columns.index(document) for document in known]] = shares
    frozen = (torch.from_numpy(q0[queries] @ d0[columns].T) / 0.05).softmax(1)
    s = q @ d.T / 0.05
    expected = (1 - distill) * F.cross_entropy(s, batch["label"])
    expected += distill / 2 * (F.cross_entropy(s, frozen) + F.cross_entropy(s, judged))
    expected.backward()
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # the targets are float32
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("saved", ["judge", "plain"])
def test_a_cross_encoder_is_no_encoder(saved: str, judge: Path) -> None:
    folder = judge.parent / saved
    said = "is a cross-encoder, which scores pairs of texts and has no embeddings"
    with pytest.raises(RefineFastError, match=said):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("an encoder", "is not a cross-encoder; give a model that scores pairs of texts"),
        ("labels", "must have 1 label (got 3); give another cross-encoder."),
        ("nothing", "is not a local folder and cannot be downloaded"),
        ("an empty folder", "holds neither config.json nor modules.json; give the folder of a cro"),
        ("no weights", "cannot be loaded as a cross-encoder ("),
        ("few words", "cannot score a pair (IndexError: "),
        ("a short reader", "gives different passages the same score, so it reads none of their"),
    ],
)
def test_what_cannot_teach_ends_the_run_at_once(
    what: str,
    message: str,
    tiny: Path,
    docs: Path,
    judge: Path,
    minilm: Path,
    tmp_path: Path,
    capsys,
) -> None:
    """In one sentence, before the first stage."""
    folder = tmp_path / "teacher"
    if what == "an encoder":
        folder = tiny
    elif what == "labels":
        folder = make_cross_encoder(tmp_path, minilm, labels=3)
    elif what == "an empty folder":
        folder.mkdir()
    elif what == "no weights":
        shutil.copytree(judge, folder)
        (folder / "model.safetensors").unlink()
    elif what == "few words":
        folder = make_cross_encoder(tmp_path, minilm, words=200)
    elif what == "a short reader":
        shutil.copytree(judge, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["model_max_length"] = 3  # as many as separate the texts
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    command = ["run", str(docs), "--model", str(tiny), "--out", str(tmp_path / "run")]
    assert main([*command, "--teacher", str(folder)]) == 2
    said = capsys.readouterr().err
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: teacher: {folder} ")
    assert message in error
    assert "chunk: " not in said


def test_the_plan_counts_its_pairs(judged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At most four negatives for each query and positive."""
    assert main(["plan", "--out", str(judged), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["pairs_scored"] == 5 * planned["training_queries"]
    assert planned["pairs_scored"] >= json.loads((judged / "teaching.json").read_text())["pairs"]


def test_what_the_teacher_says(judged: Path, judge: Path) -> None:
    """Of each query, the positives and the mined negatives with the logits of their texts; a
    negative above a positive is left out."""
    model = load_cross_encoder(judge)
    text = {chunk.id: chunk.passage for chunk in read_records(judged / "chunks.jsonl", Chunk)}
    mined = [json.loads(line) for line in (judged / "negatives.jsonl").open()]
    records = taught(judged)
    assert max(len(record["negatives"]) for record in mined) == 4
    assert [record["query"] for record in records] == [record["query"] for record in mined]
    for record, before in zip(records, mined, strict=True):
        lowest = min(positive["logit"] for positive in record["positives"])
        assert all(found["logit"] <= lowest for found in record["negatives"])
        assert all(found["logit"] > lowest for found in record["relabelled"])
        left = {
            found["chunk_id"]: found["score"]
            for found in (*record["negatives"], *record["relabelled"])
        }
        assert left == {found["chunk_id"]: found["score"] for found in before["negatives"]}
    assert all(any(record[kind] for record in records) for kind in ("negatives", "relabelled"))
    for kind in ("positives", "negatives", "relabelled"):
        found = next(record for record in records if record[kind])
        pair = (found["query"], text[found[kind][0]["chunk_id"]])
        logit = model.predict(pair, activation_fn=torch.nn.Identity())
        assert found[kind][0]["logit"] == pytest.approx(float(logit), abs=1e-4)
    facts = json.loads((judged / "teaching.json").read_text())
    counts = {
        kind: sum(len(record[kind]) for record in records)
        for kind in ("positives", "negatives", "relabelled")
    }
    assert facts == {
        "pairs": sum(counts.values()),
        "negatives": counts["negatives"] + counts["relabelled"],
        "relabelled": counts["relabelled"],
    }


def test_an_export_has_the_teachers_scores(judged: Path, tmp_path: Path, capsys) -> None:
    """And the negatives that training sees; not those of a teacher that scored another set."""
    command = ["export", "--format", "flagembedding", "--out"]
    assert main([*command[:1], str(judged), *command[1:], str(tmp_path / "taught.jsonl")]) == 0
    said = capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "taught.jsonl").open(encoding="utf-8")]
    records = {record["query"]: record for record in taught(judged)}
    usable = {text for text, record in records.items() if record["negatives"]}
    assert {line["query"] for line in lines} == usable
    if left_out := len(records) - len(usable):
        assert f"needs one: {left_out} are left out, since no other passage has the" in said
    assert "; their scores are the logits of the teacher\n" in said
    for line in lines:
        for side, kind in (("pos", "positives"), ("neg", "negatives")):
            logits = {each["chunk_id"]: each["logit"] for each in records[line["query"]][kind]}
            assert dict(zip(line[f"{side}_ids"], line[f"{side}_scores"], strict=True)) == logits

    remined = shutil.copytree(judged, tmp_path / "run")
    assert main(["mine", "--out", str(remined), "--negatives", "1", "--skip", "1", "--quiet"]) == 0
    capsys.readouterr()
    assert main([*command[:1], str(remined), *command[1:], str(tmp_path / "mined.jsonl")]) == 0
    assert "logits" not in capsys.readouterr().err

    without = shutil.copytree(judged, tmp_path / "without")
    config = (without / "config.yaml").read_text()
    lines = ("teacher: null" if x.startswith("teacher: ") else x for x in config.splitlines())
    (without / "config.yaml").write_text("\n".join(lines))
    assert main([*command[:1], str(without), *command[1:], str(tmp_path / "without.jsonl")]) == 0
    assert "logits" not in capsys.readouterr().err


def test_an_export_says_where_the_teacher_is_missing(judged: Path, tmp_path: Path, capsys) -> None:
    """Scores that are damaged, or another teacher's; those of a run that has no teacher any more
    are not used."""
    out = shutil.copytree(judged, tmp_path / "run")
    command = ["export", str(out), "--format", "llama_index", "--overwrite"]
    whole = (out / "taught.jsonl").read_bytes()
    (out / "taught.jsonl").write_bytes(whole[: len(whole) // 2])
    assert main(command) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the teacher's scores are not up to date (teach: taught.jsonl was changed)" in said
    assert "logits" not in said
    (out / "taught.jsonl").write_bytes(whole)
    manifest = (out / "manifest.json").read_text()
    recorded = json.loads(manifest)
    recorded["teach"]["settings"]["teacher"] = "org/another"
    (out / "manifest.json").write_text(json.dumps(recorded))
    assert main(command) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the teacher's scores are not up to date (teach: config.teacher was changed)" in said
    (out / "manifest.json").write_text(manifest)
    config = (out / "config.yaml").read_text(encoding="utf-8")
    without = [line for line in config.splitlines() if not line.startswith("teacher: ")]
    (out / "config.yaml").write_text("\n".join(without), encoding="utf-8")
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "not up to date" not in said
    assert "logits" not in said


def test_a_negative_above_a_positive_is_not_trained_on(judged: Path) -> None:
    chunks, queries = training_view(judged)
    relevant, found = relevant_rows(chunks, queries), read_taught(judged)
    examples = _examples(judged, chunks, relevant, 4, found)
    assert len(examples) == len(queries)
    left_out = 0
    for example in examples:
        negatives = [chunks[row].id for row in example.negatives]
        assert negatives == [kept["chunk_id"] for kept in found[example.query]["negatives"]]
        left_out += len(found[example.query]["relabelled"])
    assert left_out > 0


def test_training_learns_from_it(judged: Path, whole: Path) -> None:
    facts = json.loads((judged / "training.json").read_text())
    assert (facts["teachers"], facts["distill"]) == (["frozen", "cross-encoder"], 0.5)
    assert facts["negatives"] == 4
    assert outputs(judged)["train"] != outputs(whole)["train"]
    assert outputs(judged)["embed"] == outputs(whole)["embed"]


def test_what_is_redone(judged: Path, judge: Path, minilm: Path, tmp_path: Path, capsys) -> None:
    """Of another teacher, what it says and what is learned from it."""
    out = shutil.copytree(judged, tmp_path / "run")

    def redone(*flags: str) -> dict[str, str]:
        assert main(["train", "--out", str(out), *flags]) == 0
        said = [line.split(": ", 1) for line in capsys.readouterr().err.splitlines()]
        return {
            stage: reason
            for stage, reason, *_ in (line for line in said if len(line) == 2)
            if "changed" in reason or " -> " in reason
        }

    assert redone() == {}
    assert redone("--teacher-temperature", "2") == {
        "train": "config.teacher_temperature 1.0 -> 2.0"
    }
    before = taught(out)
    other = make_cross_encoder(tmp_path, minilm, seed=1)
    found = redone("--teacher", str(other), "--teacher-temperature", "1")
    assert found.keys() == {"teach", "train"}
    assert found["teach"].startswith("teacher changed")
    assert taught(out) != before


def test_a_killed_run_resumes(judged: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """It scores the rest, and writes the same bytes."""
    out = shutil.copytree(judged, tmp_path / "run")
    (out / "taught.jsonl").unlink()
    scored = interrupt_scoring(monkeypatch)
    assert main(["train", "--out", str(out)]) == 130
    assert main(["train", "--out", str(out)]) == 0
    pairs = json.loads((out / "teaching.json").read_text())["pairs"]
    block = cross_encoder.BLOCK
    assert scored[:5] == [2, block, 0, 2, block]  # each start tries the model on two pairs
    assert sum(scored[4:]) == pairs - block
    assert outputs(out)["teach"] == outputs(judged)["teach"]


def test_the_report_and_the_card_name_it(
    judged: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no stage reads a setting that it does not declare."""
    out = shutil.copytree(judged, tmp_path / "run")
    undeclared = undeclared_settings(monkeypatch)
    assert (
        main(["run", "--out", str(out), "--max-steps", "1", "--precision", "auto", "--quiet"]) == 0
    )
    assert {"teach", "train", "fuse", "report"} <= undeclared.keys()
    assert not any(undeclared.values()), undeclared
    facts = json.loads((out / "teaching.json").read_text())
    left_out = f"{facts['relabelled']} of {facts['negatives']} left out, which judge scores above a"
    loss = "0.5 InfoNCE + 0.5 distillation from the frozen encoder and the cross-encoder judge over"
    for name in ("report.md", "model/README.md"):
        text = (out / name).read_text()
        assert left_out in text
        assert loss in text
    report = json.loads((out / "report.json").read_text())
    assert report["mining"]["relabelled"] == {
        "by": "judge",
        "count": facts["relabelled"],
        "mined": facts["negatives"],
    }
    assert "teach" in report["stages"]
    trained = {record["query"]: len(record["negatives"]) for record in map(dict, taught(out))}
    shown = {triple["query"]: len(triple["negatives"]) for triple in report["mining"]["triples"]}
    assert shown == {query: trained[query] for query in shown}
