"""The Python blocks of the README and of the guides, each run as it stands, in a folder with a real
model as ``base``, a changed copy of it as ``tuned``, and a few documents in ``docs``; the command
lines and flags that they name."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from textwrap import dedent, indent

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")
ROOT = Path(__file__).parent.parent
GUIDES = ROOT / ".github" / "docs"
PAGES = [ROOT / "README.md", *sorted(GUIDES.glob("*.rst"))]


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks in a language."""
    if page.suffix == ".md":
        return re.findall(rf"^```{language}\n(.+?)^```", page.read_text(), re.S | re.M)
    indented = rf"^\.\. code-block:: {language}\n((?:\n|   .*\n)+)"
    return [dedent(block).strip("\n") for block in re.findall(indented, page.read_text(), re.M)]


BLOCKS = [
    block for page in PAGES for block in blocks(page, "python") if not block.startswith("# before")
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """MiniLM with other weights."""
    torch.manual_seed(0)
    folder = shutil.copytree(minilm, tmp_path_factory.mktemp("readme") / "tuned")
    changed = {
        name: w + 0.01 * torch.randn_like(w) if w.is_floating_point() else w
        for name, w in load_file(minilm / "model.safetensors").items()
    }
    save_file(changed, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "block",
    BLOCKS,
    ids=[re.sub(r"\W+", "-", block.strip().splitlines()[-1])[:40] for block in BLOCKS],
)
def test_block_runs(
    block: str, minilm: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    (tmp_path / "base").symlink_to(minilm)
    (tmp_path / "tuned").symlink_to(tuned)
    (tmp_path / "docs").mkdir()
    for name in sorted(topics)[:20]:
        (tmp_path / "docs" / f"{name}.md").write_text(topics[name][:600], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a block", "exec"), {"__name__": "readme"})


def test_scale_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(GUIDES / "scale.rst", "python")
    exec(compile(block, "scale.rst", "exec"), {})
    assert indent(capsys.readouterr().out, "   ") in (GUIDES / "scale.rst").read_text()


def test_every_command_line_is_accepted() -> None:
    from refine_fast.cli import parser

    top = parser()
    lines = [
        line
        for page in PAGES
        for block in blocks(page, "bash")
        for line in re.findall(r"^refine-fast (.+?)(?: +[#>].*)?$", block, re.M)
    ]
    assert len(lines) > 30
    for line in lines:
        top.parse_args(shlex.split(line.replace("docs/", str(Path(__file__).parent))))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_named_exists(page: Path) -> None:
    """In code within a sentence that is a flag or a command of refine-fast."""
    from refine_fast.cli import parser

    (commands,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    known = {
        flag for command in commands.choices.values() for flag in command._option_string_actions
    }
    text = re.sub(r"^```.+?^```", "", page.read_text(), flags=re.S | re.M)
    mark = "`" if page.suffix == ".md" else "``"
    code = re.findall(rf"{mark}((?:--|refine-fast|run |index ).+?){mark}", text, re.S)
    named = {flag for words in code for flag in re.findall(r"--[a-z][a-z-]*", words)}
    assert named <= known
