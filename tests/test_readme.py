"""The README's Python blocks, each run as it stands, in a folder with a real model as ``base``,
a changed copy of it as ``tuned``, and a few documents in ``docs``."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")
README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = [
    block for block in re.findall(r"```python\n(.+?)```", README, re.S) if "# before" not in block
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
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_every_flag_named_exists() -> None:
    from refine_fast.cli import parser

    top = parser()
    for line in re.findall(r"^refine-fast (.+?)(?:  +#.*)?$", README, re.M):
        words = shlex.split(line.replace("docs/", str(Path(__file__).parent)))
        top.parse_args(words)
