"""What a run accepts, and what it says about what it does not: field, value, remedy, in one sentence, with exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from refine_fast.cli import main
from refine_fast.errors import RefineFastError
from refine_fast.pipeline.config import QUICK, RunConfig, load_config

NO_BAND = "is no band; its two cosine similarities must satisfy -1 <= low < high <= 1, such as 0.5,0.7, or auto."
BAD_FLAGS = [
    ("--skip", "-1", "skip: -1 is below 0; give a whole number of at least 0."),
    ("--skip", "five", "skip: five is no whole number; give one of at least 0."),
    ("--negatives", "1.5", "negatives: 1.5 is no whole number; give one of at least 0."),
    ("--batch-size", "1", "batch_size: 1 is below 2; give a whole number of at least 2."),
    ("--seed", "-3", "seed: -3 is below 0; give a whole number of at least 0."),
    ("--seed", "4294967296", "seed: 4294967296 is above 4294967295; give a whole number of at most 4294967295."),
    ("--limit", "1", "limit: 1 is below 2; give a whole number of at least 2."),
    ("--chunk-tokens", "8", "chunk_tokens: 8 is below 32; give a whole number of at least 32."),
    ("--queries-per-chunk", "0", "queries_per_chunk: 0 is below 1; give a whole number of at least 1."),
    ("--max-steps", "0", "max_steps: 0 is below 1; give a whole number of at least 1."),
    ("--lr", "0", "lr: 0 is out of range; give a number above 0."),
    ("--lr", "fast", "lr: fast is no number; give one above 0."),
    ("--lr", "nan", "lr: nan is out of range; give a number above 0."),
    ("--epochs", "inf", "epochs: inf is out of range; give a number above 0."),
    ("--temperature", "-0.1", "temperature: -0.1 is out of range; give a number above 0."),
    ("--warmup", "2", "warmup: 2 is out of range; give a number at least 0 and at most 1."),
    ("--held-out", "0.6", "held_out: 0.6 is out of range; give a number above 0 and at most 0.5."),
    ("--weight", "1.5", "weight: 1.5 is out of range; give a number at least 0 and at most 1, or auto."),
    ("--weight", "best", "weight: best is no number; give one at least 0 and at most 1, or auto."),
    ("--curve", "0,2", "curve: 0,2 has a weight out of range; each must be at least 0 and at most 1."),
    ("--curve", "a", "curve: a is no list of weights; give some such as 0,0.35,1."),
    ("--band", "0.7", "band: 0.7 is no band; give two cosine similarities such as 0.5,0.7, or auto."),
    ("--band", "0.7,0.5", f"band: 0.7,0.5 {NO_BAND}"),
    ("--band", "0.5,nan", f"band: 0.5,nan {NO_BAND}"),
    ("--select", "easiest", "select: easiest is unknown; choose one of hardest, random."),
    ("--precision", "fp8", "precision: fp8 is unknown; choose one of auto, fp32, bf16."),
    ("--memory", "lots", "memory: lots is no amount of memory; give one such as 8GB or 512MB."),
    ("--memory", "0GB", "memory: 0GB is no amount of memory; give one such as 8GB or 512MB."),
    ("--fusion", "both", "fusion: both is unknown; choose one of weights, embeddings."),
    ("--llm", "localhost", "llm: 'localhost' is no endpoint; give a URL such as http://localhost:8000/v1, or transformers."),
    ("--llm", "http://localhost:8000/v1", "llm_model: no model named; add --llm-model NAME."),
    ("--llm-model", "small", "llm_model: there is no model to ask; add --llm URL, or leave it out."),
    ("--judge", "yes", "judge: there is no model to ask; add --llm URL, or leave it out."),
    ("--model", "", "model: '' is no text; give a name."),
    ("--queries", "nowhere.jsonl", "queries: nowhere.jsonl does not exist; give the path of an existing file or folder."),
    ("--queries", "", "queries: '' is empty; give a path."),
    ("--ood", "nowhere", "ood: nowhere does not exist; give the path of an existing file or folder."),
    ("--config", "nowhere.yaml", "config: nowhere.yaml does not exist; give the path of a YAML file."),
]


@pytest.mark.parametrize(("flag", "value", "message"), BAD_FLAGS, ids=[f"{flag}={value}" for flag, value, _ in BAD_FLAGS])
def test_bad_flag(tmp_path: Path, monkeypatch, capsys, flag: str, value: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--out", "run", f"{flag}={value}"]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skp: 3", "config: {path} has an unknown key 'skp'; did you mean skip?"),
        ("zebra: 3", "config: {path} has an unknown key 'zebra'; see refine-fast run --help."),
        ("- skip", "config: {path} holds no keys; write lines such as 'skip: 5'."),
        ("skip: [", "config: {path} cannot be read as YAML (while parsing a flow node expected the node content, but found"),
        ("skip: null", "skip: None is no whole number; give one of at least 0."),
        ("model: 7", "model: 7 is no text; give a name."),
        ("band: [0.5]", "band: 0.5 is no band; give two cosine similarities such as 0.5,0.7, or auto."),
        ("llm_model: 7", "llm_model: there is no model to ask; add --llm URL, or leave it out."),
        ("docs: nowhere", "docs: {folder}/nowhere does not exist; give the path of an existing file or folder."),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(RefineFastError) as error:
        load_config(path, {"out": "run"})
    assert str(error.value).startswith(message.format(path=path, folder=tmp_path))


def test_no_run_folder(capsys) -> None:
    assert main(["run"]) == 2
    assert capsys.readouterr().err == "error: out: no run folder given; add --out FOLDER.\n"


def test_the_weight_in_the_loss(tmp_path: Path, capsys) -> None:
    assert main(["plan", "--out", str(tmp_path / "run"), "--fusion", "embeddings", "--weight", "auto"]) == 2
    says = "error: weight: auto chooses it after training, but fusion embeddings has it in the loss; give a number.\n"
    assert capsys.readouterr().err == says


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RefineFastError, match=r"^out: .*/file is a file; name a folder\.$"):
        RunConfig(out=tmp_path / "file")
    with pytest.raises(RefineFastError, match=r"^out: .*/run lies in the documents' folder, so the run would read its own files; name"):
        RunConfig(docs=tmp_path, out=tmp_path / "run")
    with pytest.raises(RefineFastError, match=r"^ood: .* is no BEIR folder \(corpus.jsonl, .*\); give one with a test split\.$"):
        RunConfig(out=tmp_path / "run", ood=(tmp_path,))
    for parent in ("one", "two"):
        (tmp_path / parent / "set" / "qrels").mkdir(parents=True)
        for name in ("corpus.jsonl", "qrels/test.tsv"):
            (tmp_path / parent / "set" / name).touch()
    with pytest.raises(RefineFastError, match=r"^ood: .* names two folders alike, and a set goes by its folder's name; rename one\.$"):
        RunConfig(out=tmp_path / "run", ood=[tmp_path / "one" / "set", tmp_path / "two" / "set"])
    assert len(RunConfig(out=tmp_path / "run", ood=[tmp_path / "one" / "set"] * 2).ood) == 1


def test_yaml_and_flags_say_the_same(tmp_path: Path) -> None:
    flags = {"out": tmp_path / "run", "band": "0.3,0.5", "weight": "auto", "memory": "8GB", "max_steps": "7", "curve": "0.5", "lr": "1e-5"}
    config = load_config(None, flags)
    assert config.band == (0.3, 0.5)
    assert config.memory == 8 * 1024**3
    assert config.curve == (0.0, 0.5, 1.0)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path, {}) == config
    path.write_text("band: [0.3, 0.5]\nweight: auto\nmemory: 8 GB\nmax-steps: 7\ncurve: [0.5]\nlr: 1e-5\nout: run\n")
    assert load_config(path, {}) == config


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("skip: 3\nnegatives: 2\n")
    config = load_config(path, {"out": tmp_path / "run", "skip": 4})
    assert (config.skip, config.negatives) == (4, 2)


def test_a_run_folder_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    docs, run = tmp_path / "docs", tmp_path / "run"
    docs.mkdir()
    run.mkdir()
    begun = RunConfig(docs=docs, out=run, skip=3)
    (run / "config.yaml").write_text(begun.to_yaml())
    assert load_config(None, {"out": run}) == begun
    assert load_config(None, {"out": run, "docs": docs}).skip == 5


@pytest.mark.parametrize(
    ("command", "package"), [(["prompt"], "jinja2"), (["plan", "--out=run", "--llm=http://localhost/v1", "--llm-model=m"], "openai")]
)
def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys, command: list[str], package: str) -> None:
    for name in [name for name in sys.modules if name.startswith("refine_fast.pipeline.queries.llm.") or name == "refine_fast.pipeline.queries.llm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(command) == 2
    assert capsys.readouterr().err == f"error: refine-fast {command[0]} needs {package}; pip install 'refine-fast[pipeline,llm]'.\n"


def test_a_relative_model_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on by its own config.yaml, wherever one stands then; names stay names."""
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert RunConfig(out=Path("run"), model="./base").model == str(tmp_path / "base")
    assert RunConfig(out=Path("run"), model="BAAI/bge-small-en-v1.5").model == "BAAI/bge-small-en-v1.5"
    (tmp_path / "my.yaml").write_text("model: base\nout: run\n")
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "my.yaml", {}).model == str(tmp_path / "base")


def test_quick_holds_real_options() -> None:
    assert RunConfig(out=Path("run"), **QUICK).max_steps == QUICK["max_steps"]
