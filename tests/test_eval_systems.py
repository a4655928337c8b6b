"""``refine-fast eval --systems``: passage vectors score as in ``eval``, and the weights come from
queries that are not scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from retrieval_sets import SMALL, folder_of

from refine_fast.cli import main
from refine_fast.pipeline.corpus.beir import RetrievalSet, load_beir
from refine_fast.pipeline.corpus.text import passage_text
from refine_fast.pipeline.evaluation.metrics import METRICS
from refine_fast.pipeline.queries.query import MADE_KINDS
from refine_fast.pipeline.serving.evaluate import choosing_set
from refine_fast.pipeline.serving.systems import SYSTEM_NAMES, sentences_of

pytestmark = pytest.mark.usefixtures("one_thread")


def split(folder: Path, name: str, places: slice) -> None:
    """Makes a split of some of the queries of the split test."""
    head, *lines = (folder / "qrels" / "test.tsv").read_text().splitlines()
    kept = list(dict.fromkeys(line.partition("\t")[0] for line in lines))[places]
    rows = [line for line in lines if line.partition("\t")[0] in kept]
    (folder / "qrels" / f"{name}.tsv").write_text("\n".join([head, *rows]) + "\n")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A set with the splits test, dev and train, of which dev shares its first query with test."""
    folder = shutil.copytree(folder_of(SMALL), tmp_path / "set")
    for path in (folder / "qrels").iterdir():
        if path.name != "test.tsv":
            path.unlink()
    split(folder, "train", slice(30, 60))
    split(folder, "dev", slice(9, 30))
    split(folder, "test", slice(0, 10))
    return folder


def evaluated(capsys: pytest.CaptureFixture[str], *command: str) -> dict:
    assert main(["eval", *command, "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_rows(data: Path, tiny: Path, whole: Path, capsys) -> None:
    models = [str(tiny), str(whole / "model")]
    found = evaluated(capsys, *models, "--data", str(data), "--systems")
    alone = evaluated(capsys, *models, "--data", str(data))["rows"]
    assert found["queries"] == 10
    assert found["chosen_on"] == {"name": "the split dev", "queries": 20}
    assert list(found["blends"]) == models
    assert all(blend["queries"] == 20 for blend in found["blends"].values())
    rows = {(row["model"], row["system"]): row for row in found["rows"]}
    systems = [name for name in SYSTEM_NAMES if name != "BM25"]
    assert list(rows) == [(None, "BM25"), *((m, s) for m in models for s in systems)]
    for row in alone:
        name = row["system"]
        same = rows[(None, "BM25")] if name == "BM25" else rows[(name, "passages")]
        assert {metric: same[metric] for metric in METRICS} == pytest.approx(
            {metric: row[metric] for metric in METRICS},
            abs=5e-3,  # a random encoder's similarities almost tie, and round otherwise here
        )
    first, second = models
    for system in systems:
        before, after = rows[first, system], rows[second, system]
        assert "gain_over_first" not in before
        for metric in METRICS:
            change = after["gain_over_first"][metric]
            assert change["mean"] == pytest.approx(after[metric] - before[metric])
            assert change["low"] <= change["mean"] <= change["high"]
            if system != "passages":
                own = after["gain"][metric]["mean"]
                assert own == pytest.approx(after[metric] - rows[second, "passages"][metric])
    assert "gain" not in rows[first, "passages"]


def test_the_table(data: Path, tiny: Path, capsys) -> None:
    assert main(["eval", str(tiny), "--data", str(data), "--systems"]) == 0
    captured = capsys.readouterr()
    for system in SYSTEM_NAMES:
        assert system in captured.out
    (line,) = (line for line in captured.err.splitlines() if "blend of best sentence" in line)
    assert line.startswith(f"{tiny}: ")
    assert line.endswith("chosen on 20 queries (the split dev)")


def test_titles_with_blanks() -> None:
    """Around them, or alone: a passage begins with its title as it is without."""
    titles, texts = [" The  Loire ", "  ", ""], ["It flows west.", "A text.", " Another one. "]
    docs = [passage_text(*pair) for pair in zip(titles, texts, strict=True)]
    data = RetrievalSet("blanks", ["a", "b", "c"], docs, [], [], [], titles)
    sentences, offsets = sentences_of(data)
    assert sentences == ["The  Loire It flows west.", "A text.", "Another one."]
    assert offsets.tolist() == [0, 1, 2, 3]


def test_where_the_weights_come_from(data: Path, tmp_path: Path) -> None:
    """No query that chooses is scored."""
    held = load_beir(data)
    shutil.copytree(data, other := tmp_path / "other")
    (other / "qrels" / "dev.tsv").rename(other / "qrels" / "validation.tsv")
    assert choosing_set(other, "test", held)[0] == "the split validation"
    for missing, name in ((None, "the split dev"), ("dev", "the split train")):
        if missing:
            (data / "qrels" / f"{missing}.tsv").unlink()
        label, chosen, kinds = choosing_set(data, "test", held)
        assert label == name
        assert len(chosen.queries) in (20, 30)
        assert kinds == ["user"] * len(chosen.queries)
        assert not set(chosen.queries) & set(held.queries)
        assert chosen.docs == held.docs
    shutil.copy(data / "qrels" / "test.tsv", data / "qrels" / "train.tsv")
    label, chosen, kinds = choosing_set(data, "test", held)
    assert label == "made from the passages"
    assert set(kinds) <= set(MADE_KINDS)
    assert len(kinds) == len(chosen.queries) > 50
    assert (chosen.docs, chosen.doc_ids) == (held.docs, held.doc_ids)
    assert not set(chosen.queries) & set(held.queries)
    assert all(set(grades) <= set(held.doc_ids) for grades in chosen.qrels)
