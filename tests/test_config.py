"""What a run accepts, and how it refuses the rest: field, value, remedy, in one sentence."""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from refine_fast import cli
from refine_fast.cli import join_negative_values, main, parser
from refine_fast.errors import RefineFastError
from refine_fast.pipeline.config import RunConfig
from refine_fast.pipeline.config_file import load_config
from refine_fast.pipeline.engine import RunFolder
from refine_fast.pipeline.recipes import QUICK, RECIPES

BAND = (
    "must be auto, or two cosine similarities LOW,HIGH with -1 <= LOW < HIGH <= 1, such as 0.5,0.7."
)
MISSING = "does not exist; give the path of an existing file or folder."
BAD_FLAGS = [
    ("--skip", "-1", "skip: -1 must be an integer >= 0."),
    ("--skip", "five", "skip: five must be an integer >= 0."),
    ("--negatives", "1.5", "negatives: 1.5 must be an integer >= 0, or auto."),
    ("--batch-size", "1", "batch_size: 1 must be an integer >= 2."),
    ("--seed", "-3", "seed: -3 must be an integer >= 0 and <= 4294967295."),
    ("--seed", "4294967296", "seed: 4294967296 must be an integer >= 0 and <= 4294967295."),
    ("--limit", "1", "limit: 1 must be an integer >= 2."),
    ("--chunk-tokens", "8", "chunk_tokens: 8 must be an integer >= 32."),
    (
        "--queries-per-chunk",
        "0",
        "queries_per_chunk: 0 must be an integer >= 1 and <= 10000, or auto.",
    ),
    (
        "--queries-per-chunk",
        "10001",
        "queries_per_chunk: 10001 must be an integer >= 1 and <= 10000, or auto.",
    ),
    ("--max-steps", "0", "max_steps: 0 must be an integer >= 1."),
    ("--lr", "0", "lr: 0 must be a number > 0."),
    ("--lr", "fast", "lr: fast must be a number > 0."),
    ("--lr", "nan", "lr: nan must be a number > 0."),
    ("--epochs", "inf", "epochs: inf must be a number > 0, or auto."),
    ("--teacher-temperature", "0", "teacher_temperature: 0 must be a number > 0."),
    (
        "--teacher-temperature",
        "2",
        "teacher_temperature: needs a teacher; add --teacher or omit it.",
    ),
    ("--temperature", "-0.1", "temperature: -0.1 must be a number > 0."),
    ("--warmup", "2", "warmup: 2 must be a number >= 0 and <= 1."),
    ("--held-out", "0.6", "held_out: 0.6 must be a number > 0 and <= 0.5."),
    ("--weight", "1.5", "weight: 1.5 must be a number >= 0 and <= 1, or auto."),
    ("--weight", "best", "weight: best must be a number >= 0 and <= 1, or auto."),
    ("--curve", "0,2", "curve: 0,2 must be fusion weights >= 0 and <= 1, such as 0,0.35,1."),
    ("--curve", "a", "curve: a must be fusion weights >= 0 and <= 1, such as 0,0.35,1."),
    ("--band", "0.7", f"band: 0.7 {BAND}"),
    ("--band", "0.7,0.5", f"band: 0.7,0.5 {BAND}"),
    ("--band", "0.5,nan", f"band: 0.5,nan {BAND}"),
    ("--select", "easiest", "select: easiest must be hardest or random."),
    ("--precision", "fp8", "precision: fp8 must be auto, fp32 or bf16."),
    ("--memory", "lots", "memory: lots must be an amount of memory, such as 8GB or 512MB."),
    ("--memory", "0GB", "memory: 0GB must be an amount of memory, such as 8GB or 512MB."),
    ("--fusion", "both", "fusion: both must be weights or embeddings."),
    ("--llm-model", "small", "llm_model: needs a language model; add --llm URL or omit it."),
    ("--judge", "yes", "judge: needs a language model; add --llm URL or omit it."),
    ("--judge", "perhaps", "judge: perhaps must be yes or no."),
    ("--model", "", "model: '' must be a non-empty string."),
    ("--queries", "nowhere.jsonl", f"queries: nowhere.jsonl {MISSING}"),
    ("--queries", "", "queries: '' must be a path."),
    ("--docs", "C:\\docs", "docs: C:\\docs is a Windows path; give a path on this machine."),
    ("--ood", "nowhere", f"ood: nowhere {MISSING}"),
    (
        "--config",
        "nowhere.yaml",
        "config: nowhere.yaml does not exist; give the path of a YAML file.",
    ),
]


@pytest.mark.parametrize(
    ("flag", "value", "message"), BAD_FLAGS, ids=[f"{flag}={value}" for flag, value, _ in BAD_FLAGS]
)
def test_bad_flag(tmp_path: Path, monkeypatch, capsys, flag: str, value: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    option = value if flag == "--docs" else f"{flag}={value}"
    assert main(["run", "--out", "run", option]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("skp: 3", "config: {path} has an unknown key 'skp'; did you mean skip?"),
        ("zebra: 3", "config: {path} has an unknown key 'zebra'; see refine-fast run --help."),
        ("- skip", "config: {path} has no keys; write lines such as 'skip: 5'."),
        (
            "skip: [",
            "config: {path} cannot be read as YAML (while parsing a flow node expected the node",
        ),
        ("title: 2024-02-30", "config: {path} cannot be read as YAML (day is out of range for"),
        ("skip: null", "skip: null must be an integer >= 0."),
        ("skip: yes", "skip: True must be an integer >= 0."),
        ("lr: yes", "lr: True must be a number > 0."),
        ("model: 7", "model: 7 must be a non-empty string."),
        ("band: [0.5]", f"band: 0.5 {BAND}"),
        ("llm_model: 7", "llm_model: needs a language model; add --llm URL or omit it."),
        ("docs: ''", "docs: '' must be a path."),
        (r"docs: C:\docs", r"docs: C:\docs is a Windows path; give a path on this machine."),
        (
            r'docs: "C:\docs"',
            "config: {path} cannot be read as YAML (while scanning a double-quoted",
        ),
        (
            "docs: nowhere",
            "docs: {folder}/nowhere does not exist; give the path of an existing file or folder.",
        ),
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
    assert (
        main(["plan", "--out", str(tmp_path / "run"), "--fusion", "embeddings", "--weight", "auto"])
        == 2
    )
    assert capsys.readouterr().err == (
        "error: weight: auto chooses the weight after training, but fusion embeddings uses it in "
        "the loss; give a number.\n"
    )
    with pytest.raises(RefineFastError, match=r"^weight: 0 leaves the fine-tuned encoder out of "):
        RunConfig(out=tmp_path / "run", fusion="embeddings", weight=0)


def test_a_teacher_needs_negatives(tmp_path: Path) -> None:
    with pytest.raises(
        RefineFastError, match="teacher: scores mined negatives, but negatives is 0"
    ):
        RunConfig(out=tmp_path / "run", teacher="some/judge", negatives=0)


def test_adapters_in_every_layer_or_the_last_layers(tmp_path: Path) -> None:
    with pytest.raises(RefineFastError, match=r"^train_layers: --lora trains adapters in every"):
        RunConfig(out=tmp_path / "run", lora=4, train_layers=2)


def test_null_is_no_name(tmp_path: Path) -> None:
    """Of ``llm_model:`` without a value in a YAML file: the model is not called None."""
    given = {"out": tmp_path / "run", "llm": "http://localhost:1/v1"}
    with pytest.raises(RefineFastError, match=r"^llm_model: no model named; add --llm-model"):
        RunConfig(**given, llm_model=None)
    assert RunConfig(out=tmp_path / "run", query_kinds=None).query_kinds == ()


def test_bad_values_of_the_python_api(tmp_path: Path) -> None:
    for name, value, message in (
        ("out", None, "out: null must be a path."),
        ("ood", 5, "ood: 5 does not exist; give the path of an existing file or folder."),
        ("llm_mix", "question=nan", "llm_mix: question=nan must be kinds and shares, such as"),
        ("llm_mix", 5, "llm_mix: 5 must be kinds and shares, such as"),
    ):
        with pytest.raises(RefineFastError) as error:
            RunConfig(**{"out": tmp_path / "run", "llm": "http://localhost:1", name: value})
        assert str(error.value).startswith(message)


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RefineFastError, match=r"^out: .*/file is a file; give a folder\.$"):
        RunConfig(out=tmp_path / "file")
    with pytest.raises(
        RefineFastError,
        match=r"^out: .*/run is inside the documents' folder, so the run would read its",
    ):
        RunConfig(docs=tmp_path, out=tmp_path / "run")
    with pytest.raises(
        RefineFastError,
        match=r"^ood: .* must be a BEIR folder with a test split \(corpus.jsonl, .*\)\.$",
    ):
        RunConfig(out=tmp_path / "run", ood=(tmp_path,))
    for parent in ("one", "two"):
        (tmp_path / parent / "set" / "qrels").mkdir(parents=True)
        for name in ("corpus.jsonl", "qrels/test.tsv"):
            (tmp_path / parent / "set" / name).touch()
    with pytest.raises(
        RefineFastError, match=r"^ood: .*one/set,.*two/set have the same folder name; rename one\.$"
    ):
        RunConfig(out=tmp_path / "run", ood=[tmp_path / "one" / "set", tmp_path / "two" / "set"])
    assert len(RunConfig(out=tmp_path / "run", ood=[tmp_path / "one" / "set"] * 2).ood) == 1
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RefineFastError, match=r"^docs: .*/loop does not exist; give the path"):
        RunConfig(docs=tmp_path / "loop", out=tmp_path / "run")
    inside = RunFolder(RunConfig(out=tmp_path / "loop" / "run").out)
    with pytest.raises(OSError, match="Too many levels of symbolic links"), inside:
        pass


def test_yaml_and_flags_say_the_same(tmp_path: Path) -> None:
    flags = {
        "out": tmp_path / "run",
        "band": "0.3,0.5",
        "weight": "auto",
        "memory": "8GB",
        "max_steps": "7",
        "curve": "0.5",
        "lr": "1e-5",
    }
    config = load_config(None, flags)
    assert config.band == (0.3, 0.5)
    assert config.memory == 8 * 1024**3
    assert config.curve == (0.0, 0.5, 1.0)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path, {}) == config
    path.write_text(
        "band: [0.3, 0.5]\nweight: auto\nmemory: 8 GB\nmax-steps: 7\ncurve: [0.5]\nlr: 1e-5\n"
        "out: run\n"
    )
    assert load_config(path, {}) == config


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("skip: 3\nnegatives: 2\n")
    config = load_config(path, {"out": tmp_path / "run", "skip": 4})
    assert (config.skip, config.negatives) == (4, 2)


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (["prompt"], "jinja2"),
        (["plan", "--out=run", "--llm=http://localhost/v1", "--llm-model=m"], "openai"),
    ],
)
def test_a_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys, command: list[str], package: str
) -> None:
    for name in [
        name
        for name in sys.modules
        if name.startswith("refine_fast.pipeline.queries.llm.")
        or name == "refine_fast.pipeline.queries.llm"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"error: refine-fast needs the package {package}; "
        "pip install 'refine-fast[pipeline,llm]'.\n"
    )


def test_a_relative_model_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is resumed by its own config.yaml from any folder; names stay names."""
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert RunConfig(out=Path("run"), model="./base").model == str(tmp_path / "base")
    assert (
        RunConfig(out=Path("run"), model="BAAI/bge-small-en-v1.5").model == "BAAI/bge-small-en-v1.5"
    )
    (tmp_path / "my.yaml").write_text("model: base\nout: run\n")
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "my.yaml", {}).model == str(tmp_path / "base")


def test_quick_holds_real_options() -> None:
    assert RunConfig(out=Path("run"), **QUICK).max_steps == QUICK["max_steps"]


def test_quick_leaves_what_is_asked_for(tmp_path: Path) -> None:
    """By the file or by a flag; not what a run that is resumed began with."""
    path = tmp_path / "my.yaml"
    path.write_text("limit: 50\nbatch_size: 4\n")
    config = cli.config_of(
        parser().parse_args(
            ["run", "--quick", "--out", str(tmp_path), "--config", str(path), "--batch-size", "5"]
        )
    )
    assert (config.limit, config.batch_size, config.max_steps) == (50, 5, QUICK["max_steps"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = cli.config_of(parser().parse_args(["run", "--quick", "--out", str(tmp_path)]))
    assert (again.limit, again.ood_passages) == (QUICK["limit"], QUICK["ood_passages"])


def test_an_unknown_option_of_the_python_api() -> None:
    with pytest.raises(RefineFastError, match=r"^skp: unknown option; did you mean skip\?$"):
        RunConfig(out="run", skp=3)


def test_an_endpoint_is_checked_with_the_rest(tmp_path: Path, capsys) -> None:
    assert main(["run", "--out", str(tmp_path / "run"), "--llm=localhost", "--llm-model=m"]) == 2
    assert capsys.readouterr().err.startswith("error: llm must be a URL ")
    assert main(["run", "--out", str(tmp_path / "run"), "--llm=http://localhost/v1"]) == 2
    assert capsys.readouterr().err.startswith("error: llm_model: ")


def test_a_config_is_a_value(tmp_path: Path) -> None:
    """Equal ones hash alike, nothing changes one, and another process gets the same."""
    one, same = (RunConfig(out=tmp_path / "run", band="0.3,0.5") for _ in range(2))
    assert one == same == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(same)
    assert one != RunConfig(out=tmp_path / "run")
    with pytest.raises(ValueError, match="frozen"):
        one.skip = 3


def test_the_schema_describes_the_fields() -> None:
    """For editors that check a YAML file."""
    schema = RunConfig.model_json_schema()
    fields = schema["properties"]
    assert list(fields) == list(RunConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert all(field["description"] and field["metavar"] for field in fields.values())
    assert (fields["skip"]["type"], fields["skip"]["minimum"]) == ("integer", 0)
    assert fields["select"]["enum"] == ["hardest", "random"]
    assert {kind["type"] for kind in fields["memory"]["anyOf"]} == {"integer", "string", "null"}


@pytest.mark.parametrize("band", [["--band=-1,1"], ["--band", "-1,1"], ["--band", "-.5,0.5"]])
def test_a_band_that_starts_with_a_minus(band: list[str]) -> None:
    options = parser().parse_args(join_negative_values(["run", "--quiet", *band, "--out", "run"]))
    assert options.band == band[-1].removeprefix("--band=")
    assert (options.quiet, options.out) == (True, "run")


def test_a_query_that_starts_with_a_minus() -> None:
    query = "-40 celsius in fahrenheit"
    options = parser().parse_args(join_negative_values(["search", "run", "--json", query]))
    assert (options.json, options.query) == (True, query)


def test_a_path_with_backslashes_in_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file that was written on Windows; with its byte order mark."""
    (tmp_path / "docs" / "pages").mkdir(parents=True)
    (tmp_path / "my.yaml").write_text("docs: docs\\pages\nout: run\n", encoding="utf-8-sig")
    assert load_config(tmp_path / "my.yaml", {}).docs == tmp_path / "docs" / "pages"
    monkeypatch.chdir(tmp_path)
    assert RunConfig(out="run", docs=r"docs\pages").docs == tmp_path / "docs" / "pages"


def test_a_double_quoted_windows_path_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(r'docs: "C:\docs"')
    with pytest.raises(RefineFastError, match=r"; put paths with \\ in single quotes\.$"):
        load_config(tmp_path / "my.yaml", {"out": "run"})


def test_without_the_pipeline_extra() -> None:
    """The operations can be imported; every command names the package that it needs."""
    code = """
import sys
sys.modules["pydantic"] = sys.modules["rich"] = None
from refine_fast.cli import main
print([main(line.split()) for line in ("fuse a b --out c", "run --out c", "--help")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    sentence = (
        "error: refine-fast needs the package pydantic; pip install 'refine-fast[pipeline,llm]'."
    )
    assert (done.stdout, done.stderr.splitlines()) == ("[2, 2, 2]\n", [sentence] * 3)


def test_every_flag_that_a_message_names_exists() -> None:
    """In any text of the package: messages, help, docstrings."""
    known, parsers = set(), [parser()]
    for each in parsers:
        known |= {option for action in each._actions for option in action.option_strings}
        for action in each._actions:
            if isinstance(action.choices, dict):
                parsers += action.choices.values()
    wrong = []
    for path in Path(cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", node.value))
                wrong += [f"{path.name}:{node.lineno} {flag}" for flag in named - known - OTHERS]
    assert wrong == []


OTHERS = {
    *("--local-dir", "--porcelain", "--short"),  # hf download, git
    *("--no-copy-tokenizer", "--no-write-model-card"),  # mergekit
    "--nproc-per-node",  # torchrun
}
"""Flags of other programs that our texts name."""


def test_recipes(tmp_path: Path) -> None:
    """--recipe paper sets the paper's constants, any flag overrides them, and the recipe of a saved
    configuration can be changed."""
    best, paper = (RunConfig(out=tmp_path, recipe=name) for name in ("best", "paper"))
    assert RunConfig(out=tmp_path) == best
    assert (best.band, best.weight, best.distill) == ("auto", "auto", "auto")
    assert {name: getattr(paper, name) for name in RECIPES["paper"]} == RECIPES["paper"]
    assert RunConfig(out=tmp_path, recipe="paper", skip=3).skip == 3
    assert (best.max_steps, RunConfig(out=tmp_path, epochs=3).max_steps) == (24, None)
    (tmp_path / "config.yaml").write_text(best.model_copy(update={"seed": 7}).to_yaml())
    changed = load_config(None, {"out": str(tmp_path), "recipe": "paper", "band": "0.1,0.2"})
    assert (changed.seed, changed.weight, changed.band) == (7, 0.35, (0.1, 0.2))
    assert load_config(None, {"out": str(tmp_path)}).weight == "auto"


def test_the_order_of_a_saved_mix_does_not_matter(tmp_path: Path) -> None:
    """A tool that sorts the keys of a YAML file changes no option."""
    config = RunConfig(out=tmp_path)
    file = tmp_path / "sorted.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(config.to_yaml()), sort_keys=True))
    assert load_config(file, {}) == config
    mixes = ("claim=0.4,question=0.6", "question=0.6,claim=0.4")
    assert len({RunConfig(out=tmp_path, llm="smollm2", llm_mix=mix) for mix in mixes}) == 1
