"""Exported training sets, read as the trainers that they are for read them."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from small_runs import SMALL

from refine_fast.cli import main, parser
from refine_fast.pipeline import RunConfig, run
from refine_fast.pipeline.artifacts import DEV, training_view
from refine_fast.pipeline.commands.export import SUFFIXES
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.corpus.beir import load_beir
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import read_records
from refine_fast.pipeline.encoder.encode import encode
from refine_fast.pipeline.encoder.load import load_encoder
from refine_fast.pipeline.queries import export_formats
from refine_fast.pipeline.queries.export_formats import BEIR_FILES, query_id
from refine_fast.pipeline.queries.query import Query
from refine_fast.pipeline.queries.user import load_queries

pytestmark = pytest.mark.usefixtures("one_thread")


def lines_of(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def rows(path: Path) -> list[dict[str, Any]]:
    """Of an export, read in the way that also cuts at U+2028."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def by_dot_product(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """MiniLM without its normalization, compared by dot product."""
    folder = shutil.copytree(minilm, tmp_path_factory.mktemp("encoder") / "minilm")
    modules = json.loads((folder / "modules.json").read_text())
    kept = [module for module in modules if not module["type"].endswith("Normalize")]
    (folder / "modules.json").write_text(json.dumps(kept))
    return folder


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, by_dot_product: Path) -> Path:
    """A mined run over the user's queries: some with two positives, some with an empty band, and
    names and texts with characters that formats must quote."""
    folder = tmp_path_factory.mktemp("asked")
    docs = folder / "docs"
    docs.mkdir()
    named = {f'ein "Dokument" {i}.txt': name for i, name in enumerate(sorted(topics)[:40])}
    for i, (file, name) in enumerate(named.items()):
        text = f'Kürbis "{i}", 南瓜\t№{i}: {name}\n{topics[name][:300]}'
        (docs / file).write_text(text, encoding="utf-8")
    questions = {file: f"was heißt\u2028{name}?" for file, name in named.items()}
    pairs = [(question, file) for file, question in questions.items()]
    pairs += [(next(iter(questions.values())), list(named)[1])]
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"text": q, "doc_id": d}) + "\n" for q, d in pairs), encoding="utf-8"
    )
    band = (0.3, 0.4)
    config = {**SMALL, "negatives": 3, "band": band, "skip": 1, "weight": "auto"}
    run(
        RunConfig(
            out=folder / "run",
            docs=docs,
            model=str(by_dot_product),
            queries=folder / "queries.jsonl",
            query_prompt="query: ",
            similarity="dot",
            **config,
        ),
        console=Console(quiet=True),
        until="mine",
    )
    return folder / "run"


@pytest.fixture(params=["whole", "asked"])
def mined(request: pytest.FixtureRequest) -> Path:
    """A finished run over generated queries, and a mined one over the user's."""
    return request.getfixturevalue(request.param)


def exported(run: Path, tmp_path: Path, format: str) -> Path:
    path = tmp_path / f"{format}{SUFFIXES[format]}"
    assert main(["export", str(run), "--format", format, "--out", str(path), "--quiet"]) == 0
    return path


def pairs(run: Path) -> set[tuple[str, str]]:
    return {(query.text, query.chunk_id) for query in training_view(run)[1]}


def negatives(run: Path) -> dict[str, list[tuple[str, float]]]:
    """Query -> (chunk, score) of its mined negatives."""
    return {
        row["query"]: [(found["chunk_id"], found["score"]) for found in row["negatives"]]
        for row in lines_of(run / "negatives.jsonl")
    }


def passages(run: Path) -> dict[str, str]:
    return {chunk.id: chunk.passage for chunk in read_records(run / "chunks.jsonl", Chunk)}


def test_the_fixture_has_every_kind_of_query(asked: Path) -> None:
    found = [len(items) for items in negatives(asked).values()]
    answers = [query for query, _ in pairs(asked)]
    assert max(answers.count(query) for query in answers) == 2
    assert {0, 3} <= set(found)
    similarity = json.loads((asked / "embeddings" / "similarity.json").read_text())
    assert similarity["similarity"] == "dot"
    assert similarity["unit"] > 2


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_run_reads_its_export_back(mined: Path, tmp_path: Path, format: str) -> None:
    path = exported(mined, tmp_path, format)
    chunks = read_records(mined / "chunks.jsonl", Chunk)
    read = {(query.text, query.chunk_id) for query in load_queries(path, chunks)}
    assert read == pairs(mined)


def test_hard_negatives_of_a_beir_folder_are_read_too(asked: Path, tmp_path: Path) -> None:
    path = exported(asked, tmp_path, "beir") / "hard-negatives.jsonl"
    chunks = read_records(asked / "chunks.jsonl", Chunk)
    assert {(q.text, q.chunk_id) for q in load_queries(path, chunks)} == pairs(asked)


def test_sentence_transformers_trains_on_triplets(asked: Path, tiny: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.training_args import (
        SentenceTransformerTrainingArguments,
    )

    path = exported(asked, tmp_path, "triplets")
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "c"))
    assert data.column_names == ["anchor", "positive", "negative", "scores"]
    text, mined = passages(asked), negatives(asked)
    expected = {
        (query, text[chunk], text[found])
        for query, chunk in pairs(asked)
        for found, _ in mined[query]
    }
    written = {(row["anchor"], row["positive"], row["negative"]) for row in data}
    assert {row for row in written if mined[row[0]]} == expected
    assert {row[:2] for row in written} == {(query, text[id]) for query, id in pairs(asked)}
    model = SentenceTransformer(str(tiny), device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    for loss in (losses.MultipleNegativesRankingLoss(model), losses.MarginMSELoss(model)):
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
        assert math.isfinite(trainer.train().training_loss)


def flagembedding(path: Path, group: int, cache: Path) -> Iterator[tuple[str, list[str]]]:
    """(query, passages) of FlagEmbedding's AbsEmbedderTrainDataset: its query_instruction_format
    "{}{}", its repetition of negatives that are fewer than the group."""
    from datasets import load_dataset

    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    assert {"pos_scores", "neg_scores"} <= set(data.column_names)  # for knowledge distillation
    for row in data:
        assert isinstance(row["pos"], list)
        assert isinstance(row["neg"], list)
        repeated = row["neg"] * math.ceil((group - 1) / len(row["neg"]))
        assert len(row["pos_scores"]) == len(row["pos"])
        assert len(row["neg_scores"]) == len(row["neg"])
        yield "{}{}".format(row["prompt"], row["query"]), [row["pos"][0], *repeated][:group]


def test_flagembedding(asked: Path, tmp_path: Path) -> None:
    path = exported(asked, tmp_path, "flagembedding")
    read = list(flagembedding(path, 8, tmp_path / "cache"))
    assert all(len(texts) == 8 for _, texts in read)
    assert {query for query, _ in read} == {f"query: {query}" for query, _ in pairs(asked)}
    text, mined = passages(asked), negatives(asked)
    for row in rows(path):
        assert {(row["query"], id) for id in row["pos_ids"]} <= pairs(asked)
        assert row["pos"] == [text[id] for id in row["pos_ids"]]
        assert not mined[row["query"]] or row["neg_ids"] == [id for id, _ in mined[row["query"]]]
        assert row["neg"] == [text[id] for id in row["neg_ids"]]


def test_tevatron(mined: Path, tmp_path: Path) -> None:
    """As tevatron's TrainDataset and DistilTrainDataset read a row."""
    from datasets import load_dataset

    path = exported(mined, tmp_path, "tevatron")
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "c"))
    text = passages(mined)
    for row in data:
        for side in ("positive_passages", "negative_passages"):
            assert len(row[side]) >= 1
            for passage in row[side]:
                whole = passage["title"] + " " + passage["text"]
                assert whole.strip() == text[passage["docid"]]
                assert isinstance(passage["score"], float)


def test_llama_index(mined: Path, tmp_path: Path) -> None:
    """As EmbeddingQAFinetuneDataset.from_json reads it, under any locale."""
    from pydantic import BaseModel

    class EmbeddingQAFinetuneDataset(BaseModel):
        queries: dict[str, str]
        corpus: dict[str, str]
        relevant_docs: dict[str, list[str]]
        mode: str = "text"

    with exported(mined, tmp_path, "llama_index").open(encoding="ascii") as file:
        data = EmbeddingQAFinetuneDataset(**json.load(file))
    assert data.queries.keys() == data.relevant_docs.keys()
    found = {(data.queries[q], id) for q, ids in data.relevant_docs.items() for id in ids}
    assert found == pairs(mined)
    assert data.corpus == {chunk.id: chunk.passage for chunk in training_view(mined)[0]}


def test_beir(asked: Path, tmp_path: Path) -> None:
    """As BEIR's GenericDataLoader reads it, each split."""
    folder = exported(asked, tmp_path, "beir")
    corpus = {row["_id"]: row for row in lines_of(folder / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in lines_of(folder / "queries.jsonl")}
    text = passages(asked)
    assert {id: f"{row['title']} {row['text']}".strip() for id, row in corpus.items()} == text
    for split, name in (("train", "queries"), ("dev", "dev"), ("test", "held_out")):
        with (folder / "qrels" / f"{split}.tsv").open(encoding="utf-8") as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_MINIMAL)
            next(reader)
            read = [(queries[query], document, int(score)) for query, document, score in reader]
        written = {(row["text"], row["chunk_id"], 1) for row in lines_of(asked / f"{name}.jsonl")}
        assert set(read) == written
        assert len(load_beir(folder, split).queries) == len({query for query, _, _ in read})
    hard = {row["qid"]: row for row in lines_of(folder / "hard-negatives.jsonl")}
    for query, found in negatives(asked).items():
        assert hard[query_id(query)]["neg"] == {"refine_fast": [id for id, _ in found]}


def test_parquet(mined: Path, tmp_path: Path) -> None:
    import pandas
    from datasets import Dataset

    path = exported(mined, tmp_path, "parquet")
    data = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    text, found = passages(mined), negatives(mined)
    assert {row["query"] for row in data} == set(found)
    for row in data:
        assert row["query_id"] == query_id(row["query"])
        assert row["negative_ids"] == [id for id, _ in found[row["query"]]]
        assert row["negatives"] == [text[id] for id in row["negative_ids"]]
        assert row["positives"] == [text[id] for id in row["positive_ids"]]
        assert len(row["negative_scores"]) == len(row["negatives"])
    assert len(pandas.read_parquet(path)) == len(data)


def test_scores_are_the_base_encoders_own_similarity(mined: Path, tmp_path: Path) -> None:
    """The dot product of the run "asked", not its share of the unit in which the band counts."""
    import pandas
    import yaml

    config = json.loads((mined / "embeddings" / "similarity.json").read_text())
    model = load_encoder(Path(yaml.safe_load((mined / "config.yaml").read_text())["model"]))
    model.similarity_fn_name = config["similarity"]
    model.prompts["query"] = config["query_prompt"]
    table = pandas.read_parquet(exported(mined, tmp_path, "parquet"))
    for row in table.head(5).itertuples():
        (q,) = encode(model, [row.query], role="query", bf16=False)
        for side in ("positive", "negative"):
            texts = list(getattr(row, f"{side}s"))
            d = (
                encode(model, texts, role="document", bf16=False)
                if texts
                else np.empty((0, len(q)))
            )
            np.testing.assert_allclose(getattr(row, f"{side}_scores"), d @ q, atol=1e-5)


def remined(whole: Path, tmp_path: Path, *flags: str) -> Path:
    out = shutil.copytree(whole, tmp_path / "run")
    assert main(["mine", "--out", str(out), *flags, "--quiet"]) == 0
    return out


@pytest.mark.parametrize("flags", [("--skip", "1000"), ("--negatives", "0")])
def test_queries_without_negatives(
    whole: Path, tmp_path: Path, capsys, flags: tuple[str, ...]
) -> None:
    """FlagEmbedding divides by the number of negatives; tevatron draws from an empty list."""
    out = remined(whole, tmp_path, *flags)
    capsys.readouterr()
    path = exported(out, tmp_path, "flagembedding")
    count = len(negatives(out))
    assert not any(negatives(out).values())
    assert capsys.readouterr().err == (
        f"warning: {count} of {count} queries have no mined negative, and a trainer of this format "
        f"needs one: {count} get a random passage.\n"
    )
    assert len(list(flagembedding(path, 2, tmp_path / "cache"))) == count
    seen = {chunk.id for chunk in training_view(out)[0]}
    for row in lines_of(path):
        assert len(row["neg"]) == 1
        assert set(row["neg_ids"]) <= seen - set(row["pos_ids"])
    assert len({id for row in lines_of(path) for id in row["neg_ids"]}) > 3
    again = path.read_bytes()
    path.unlink()
    assert exported(out, tmp_path, "flagembedding").read_bytes() == again
    assert all(row["neg"] == {"refine_fast": []} for row in lines_of(
        exported(out, tmp_path, "beir") / "hard-negatives.jsonl"
    ))  # fmt: skip


def test_stdout_and_json(whole: Path, tmp_path: Path, capfdbinary) -> None:
    path = exported(whole, tmp_path, "flagembedding")
    assert main(["export", str(whole), "--format", "flagembedding", "--out", "-"]) == 0
    captured = capfdbinary.readouterr()
    assert captured.out == path.read_bytes()
    assert b"mined negatives are on stdout" in captured.err
    assert b"puts 'query: ' before queries and 'passage: ' before passages" in captured.err
    other = tmp_path / "other.jsonl"
    flags = ["--format", "triplets", "--out", str(other), "--json", "--quiet"]
    assert main(["export", str(whole), *flags]) == 0
    facts = json.loads(capfdbinary.readouterr().out)
    assert facts["export"] == str(other)
    assert facts["queries"] == len(negatives(whole))
    assert facts["mined_negatives"] == sum(map(len, negatives(whole).values()))


def test_a_reader_that_has_enough(whole: Path) -> None:
    command = [sys.executable, "-m", "refine_fast", "export", str(whole), "--format", "tevatron"]
    shell = " ".join(f"'{word}'" for word in [*command, "--out", "-", "--quiet"])
    done = subprocess.run(["sh", "-c", f"{shell} | head -c 10"], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b'{"query_id', b"")


def test_the_default_is_in_the_run_folder_and_no_stage_minds(copied: Path, capsys) -> None:
    for format, suffix in SUFFIXES.items():
        assert main(["export", str(copied), "--format", format]) == 0
        assert (copied / "export" / f"{format}{suffix}").exists()
        assert main(["export", str(copied), "--format", format]) == 2
        assert "exists; give another, or add --overwrite." in capsys.readouterr().err
        assert main(["export", str(copied), "--format", format, "--overwrite"]) == 0
    assert main(["run", "--out", str(copied)]) == 0
    assert "not done" not in capsys.readouterr().err
    assert not list(copied.rglob("*.tmp"))


def refusal(capsys, run: Path, *flags: str) -> str:
    capsys.readouterr()
    assert main(["export", str(run), *flags]) == 2
    return str(capsys.readouterr().err)


def test_what_is_no_mined_run(copied: Path, tmp_path: Path, docs: Path, capsys) -> None:
    for folder in (tmp_path / "missing", docs, docs / "nothing.md"):
        assert f"{folder} is not a run folder; give one that" in refusal(
            capsys, folder, "--format", "beir"
        )
    assert not (tmp_path / "missing").exists()
    manifest = json.loads((copied / "manifest.json").read_text())
    stopped = {name: record for name, record in manifest.items() if name in ("chunk", "query")}
    (copied / "manifest.json").write_text(json.dumps(stopped))
    message = refusal(capsys, copied, "--format", "beir")
    assert "(mine: not done yet); finish it first: refine-fast mine --out" in message
    assert not (copied / "export").exists()


@pytest.mark.parametrize("name", ["chunks.jsonl", "queries.jsonl", "negatives.jsonl"])
def test_a_run_that_was_stopped_between_stages(copied: Path, capsys, name: str) -> None:
    """Its chunks are newer than its negatives, which name chunks that are gone."""
    (copied / name).write_text((copied / name).read_text() + "\n")
    assert f"(mine: {name} was changed)" in refusal(capsys, copied, "--format", "triplets")
    (copied / name).unlink()
    assert f"(mine: {name} " in refusal(capsys, copied, "--format", "triplets")


def test_an_upgrade_does_not_make_a_run_stale(copied: Path, tmp_path: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["mine"]["code"] = {"refine_fast.mine": "of an older version"}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    exported(copied, tmp_path, "triplets")


def test_documents_that_are_gone(copied: Path, tmp_path: Path, capsys) -> None:
    """The configuration cannot be read then; a teacher that the run never had is not missed."""
    config = (copied / "config.yaml").read_text()
    lines = ("docs: gone" if x.startswith("docs: ") else x for x in config.splitlines())
    (copied / "config.yaml").write_text("\n".join(lines))
    capsys.readouterr()
    exported(copied, tmp_path, "triplets")
    assert "teacher" not in capsys.readouterr().err


def test_places_that_cannot_be_written(copied: Path, docs: Path, tmp_path: Path, capsys) -> None:
    def out(format: str, path: Path | str, *flags: str) -> str:
        return refusal(capsys, copied, "--format", format, "--out", str(path), *flags)

    for format in ("beir", "parquet"):
        assert f"{format} cannot be written to stdout; give a" in out(format, "-")
    assert "must end in .jsonl for the format flagembedding" in out("flagembedding", "x.txt")
    inside = copied / "queries.jsonl"
    before = inside.read_bytes()
    assert "is inside the run folder" in out("triplets", inside, "--overwrite")
    assert "is inside the run folder" in out("beir", copied, "--overwrite")
    assert inside.read_bytes() == before
    assert "the next run would read it as a document" in out("triplets", docs / "new.jsonl")
    (tmp_path / "a.jsonl").mkdir()
    assert "exists and is not a file" in out("triplets", tmp_path / "a.jsonl", "--overwrite")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    assert "exists; give another, or add --overwrite" in out("beir", mine)
    assert "holds other files too, such as thesis.tex" in out("beir", mine, "--overwrite")
    assert (mine / "thesis.tex").read_text() == "years of work"
    (tmp_path / "link").symlink_to(mine)
    assert "exists and is not a folder" in out("beir", tmp_path / "link", "--overwrite")
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    capsys.readouterr()
    for name in ("file", "loop"):
        flags = ["--format", "triplets", "--out", str(tmp_path / name / "a.jsonl")]
        assert main(["export", str(copied), *flags]) == 1
        assert f"{tmp_path / name}: File exists; fix this" in capsys.readouterr().err


def test_an_export_that_fails_leaves_the_earlier_one(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(whole, tmp_path, "beir")
    (tmp_path / ".beir.tmp").mkdir()  # a kill left it
    (tmp_path / ".beir.tmp" / "half.jsonl").write_text("{")
    flags = ["export", str(whole), "--format", "beir", "--out", str(folder), "--overwrite"]
    assert main([*flags, "--quiet"]) == 0
    before = sorted(path.name for path in folder.iterdir())
    assert before == sorted(BEIR_FILES)

    def full(path: Path, pairs: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(export_formats, "_write_qrels", full)
    assert main([*flags, "--quiet"]) == 1
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["beir"]


def test_a_new_folder_is_made(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.jsonl"
    assert main(["export", str(whole), "--format", "triplets", "--out", str(path), "--quiet"]) == 0
    assert path.exists()


def test_a_new_run_trains_on_an_exported_folder(asked: Path, tiny: Path, tmp_path: Path) -> None:
    """The BEIR folder is documents, queries and test at once. What it trains on and what chooses
    the weight are the first run's. Its test queries are not the new run's to export, and a split
    without queries has no qrels."""
    folder = exported(asked, tmp_path, "beir")
    out = tmp_path / "again"
    small = {**SMALL, "max_steps": 1}
    context = run(
        RunConfig(out=out, docs=folder, queries=folder, model=str(tiny), **small),
        console=Console(quiet=True),
    )
    again_in = tmp_path / "exported"
    again_in.mkdir()
    compared, before = (
        {(query.text, query.chunk_id) for query in read_records(folder / DEV, Query)}
        for folder in (out, asked)
    )
    assert compared == before
    assert pairs(out) == pairs(asked)
    again = exported(out, again_in, "beir")
    assert sorted(path.stem for path in (again / "qrels").iterdir()) == ["dev", "train"]
    assert context.report["in_domain"]["queries"] == len(load_beir(folder).queries)


def test_formats_of_the_flag() -> None:
    for format in SUFFIXES:
        assert parser().parse_args(["export", "run", "--format", format]).format == format
