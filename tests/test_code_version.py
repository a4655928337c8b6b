"""What a stage depends on is found in its source: the import closure of its module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from refine_fast.pipeline import code_version as module
from refine_fast.pipeline.code_version import CodeVersion

STAGES = sorted(
    path.stem
    for path in (Path(module.__file__).parent / "stages").glob("*.py")
    if path.stem != "__init__"
)


def forget() -> None:
    for function in (module.code_version, module._inspect, module._path, module._data_files):
        function.cache_clear()


def version_of(name: str) -> CodeVersion:
    forget()
    return module.code_version(name)


@pytest.fixture(autouse=True)
def _leaves_no_version_behind() -> Iterator[None]:
    """The versions are cached for the process, and the runs of later tests read them."""
    yield
    forget()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a stage that imports, in this order of depth: steps, maths, text."""
    root = tmp_path / "toy"
    files = {
        "__init__.py": "import toy.unrelated",
        "stage.py": "from . import steps\n\ndef run():\n    from .maths import double\n",
        "steps.py": "import json\nimport numpy as np\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from .only_types import T\nelse:\n    from .at_run_time import T\n",
        "maths.py": 'def double(x):\n    """Twice."""\n    return 2 * x\n',
        "only_types.py": "T = int\n",
        "at_run_time.py": "T = object\n",
        "unrelated.py": "",
        "templates/page.txt": "hello",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "PACKAGE", "toy")
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


def test_the_closure(package: Path) -> None:
    found = version_of("toy.stage")
    assert list(found.modules) == ["toy.at_run_time", "toy.maths", "toy.stage", "toy.steps"]
    assert set(found.packages) == {"numpy", "python"}


@pytest.mark.parametrize(
    ("file", "text", "counts"),
    [
        ("maths.py", "def double(x):\n    return 3 * x\n", True),
        ("maths.py", "# twice\ndef double( x ):\n    'Two times.'\n    return 2*x\n", False),
        ("only_types.py", "T = str\n", False),
        ("unrelated.py", "x = 1\n", False),
        ("templates/page.txt", "goodbye", True),
    ],
)
def test_what_counts_as_a_change(package: Path, file: str, text: str, counts: bool) -> None:
    before = version_of("toy.stage")
    (package / file).write_text(text)
    assert (version_of("toy.stage") != before) == counts


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_the_pipeline(stage: str) -> None:
    """The configuration and the console are not part of any stage: options are declared as
    settings, and what is shown decides nothing."""
    found = version_of(f"refine_fast.pipeline.stages.{stage}")
    for name in ("config", "console", "context", "engine", "runner", "commands"):
        assert f"refine_fast.pipeline.{name}" not in found.modules
    assert not any("cluster" in name for name in found.modules)
    assert "ray" not in found.packages
    assert "refine_fast" not in found.modules  # whose __init__ imports everything


@pytest.mark.parametrize(
    ("stage", "needs", "must_not_need"),
    [
        ("chunk", "refine_fast.pipeline.corpus.formats.pdf", "refine_fast.mine"),
        ("query", "refine_fast.pipeline.queries.synthetic", "refine_fast.pipeline.queries.llm"),
        ("llm_query", "refine_fast.pipeline.queries.llm.reply_parser", "refine_fast.fuse"),
        ("embed", "refine_fast.pipeline.encoder.encode", "refine_fast.mine"),
        ("mine", "refine_fast.mine", "refine_fast.pipeline.encoder.encode"),
        ("mine", "refine_fast._core", "refine_fast.pipeline.reporting.render"),
        ("train", "refine_fast.nn", "refine_fast.pipeline.queries.synthetic"),
        ("score", "refine_fast.pipeline.evaluation.bm25", "refine_fast.pipeline.reporting.render"),
        ("fuse", "refine_fast.fuse.merge", "refine_fast.pipeline.reporting.figures"),
        ("report", "refine_fast.pipeline.reporting.figures", "refine_fast.fuse"),
    ],
)
def test_the_dependencies_of_a_stage(stage: str, needs: str, must_not_need: str) -> None:
    found = version_of(f"refine_fast.pipeline.stages.{stage}").modules
    assert needs in found
    assert must_not_need not in found


def test_a_change_of_the_calibration_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """calibrate_band decides what ``--band auto`` mines."""
    name = "refine_fast.pipeline.stages.mine"
    before = version_of(name)
    parse = ast.parse

    def with_another_quantile(source: str, *args: object, **kwargs: object) -> ast.AST:
        return parse(source.replace("quantile(0.25", "quantile(0.75"), *args, **kwargs)

    monkeypatch.setattr(module.ast, "parse", with_another_quantile)
    after = version_of(name)
    changed = [key for key in before.modules if before.modules[key] != after.modules[key]]
    assert changed == ["refine_fast.mine"]
