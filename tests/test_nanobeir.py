"""NanoBEIR by name: read through datasets from a folder laid out as the one on Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refine_fast.errors import RefineFastError
from refine_fast.pipeline import RunConfig
from refine_fast.pipeline.config_file import load_config
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.context import RunContext
from refine_fast.pipeline.corpus import nanobeir
from refine_fast.pipeline.corpus.nanobeir import SPLITS, is_nanobeir, nanobeir_folder
from refine_fast.pipeline.stages.score import scored_sets

PARTS = {
    "corpus": [{"_id": "d1", "text": "the Loire"}, {"_id": "d2", "text": "Über 100 °C"}],
    "queries": [{"_id": "q1", "text": "a river in France"}],
    "qrels": [{"query-id": "q1", "corpus-id": "d1"}],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset with NanoBEIR's configurations and the split NanoSciFact, and an empty cache."""
    folder, configs = tmp_path / "hub", []
    for part, rows in PARTS.items():
        (folder / part).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / part / "NanoSciFact.jsonl").write_text(lines)
        configs.append(
            f"- config_name: {part}\n  data_files:\n"
            f"  - split: NanoSciFact\n    path: {part}/NanoSciFact.jsonl\n"
        )
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    monkeypatch.setattr(nanobeir, "DATASET", str(folder))
    monkeypatch.setenv("REFINE_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return folder


def test_a_set_is_fetched_once_and_read_as_any_other(
    hub: Path, tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(out=tmp_path / "run", docs=hub, ood="nanobeir/scifact")
    context = RunContext(config, minilm, Console(quiet=True))
    [folder] = context.ood
    assert folder == nanobeir_folder("nanobeir/scifact") == tmp_path / "cache" / "nanobeir-scifact"
    monkeypatch.setattr(nanobeir, "DATASET", "gone")
    assert context.ood == RunContext(config, minilm, Console(quiet=True)).ood
    monkeypatch.setattr("refine_fast.pipeline.stages.score.in_domain_set", lambda *_, **__: None)
    data = scored_sets(context)["ood:nanobeir-scifact"]
    assert (data.docs, data.queries) == (["the Loire", "Über 100 °C"], ["a river in France"])
    assert data.qrels == [{"d1": 1.0}]


def test_what_cannot_be_fetched_leaves_nothing(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RefineFastError, match=r"^ood: nanobeir/nq is not in .*cache and cannot be fetched .*; conn"
    ):
        nanobeir_folder("nanobeir/nq")  # the dataset has no such split
    assert list((tmp_path / "cache").iterdir()) == []


def test_names(hub: Path, tmp_path: Path) -> None:
    """Names survive config.yaml; a folder of that name comes first."""
    assert not is_nanobeir("scifact", tmp_path)
    assert is_nanobeir("nanobeir", tmp_path)
    (tmp_path / "nanobeir" / "own").mkdir(parents=True)
    assert not is_nanobeir("nanobeir", tmp_path)
    assert not is_nanobeir("nanobeir/own", tmp_path)
    config = RunConfig(out=tmp_path / "run", docs=hub, ood=["nanobeir", "nanobeir/scifact"])
    assert config.ood == tuple(f"nanobeir/{name}" for name in SPLITS)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file, {}).ood == config.ood
    own = tmp_path / "nanobeir-scifact"
    (own / "qrels").mkdir(parents=True)
    for part in ("corpus.jsonl", "qrels/test.tsv"):
        (own / part).touch()
    assert len(RunConfig(out=tmp_path / "run", docs=hub, ood=["nanobeir/fever", own]).ood) == 2
    with pytest.raises(RefineFastError, match=r"^ood: .* have the same folder name; rename one"):
        RunConfig(out=tmp_path / "run", docs=hub, ood=["nanobeir/scifact", own])
    with pytest.raises(RefineFastError, match=r"^ood: nanobeir/x must name one of arguana, .*2020"):
        RunConfig(out=tmp_path / "run", docs=hub, ood="nanobeir/x")
