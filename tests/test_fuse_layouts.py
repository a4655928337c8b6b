"""Folders in which more lies than one model in safetensors: what is fused, left out and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import refine_fast as rf
from refine_fast.errors import RefineFastError

HALF = {"w": torch.full((2, 2), 0.5)}


def model(folder: Path, value: float, modules: dict[str, str] | None = None) -> Path:
    """One matrix in the root, or one in the folder of each of ``modules`` that is no Pooling."""
    for place, kind in (modules or {"": "Transformer"}).items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        if kind != "Pooling":
            save_file({"w": torch.full((2, 2), value)}, folder / place / "model.safetensors")
    if modules is not None:
        listed = [
            {
                "idx": i,
                "name": str(i),
                "path": place,
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, (place, kind) in enumerate(modules.items())
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def pickled(folder: Path) -> None:
    (content := folder / "model.safetensors").unlink()
    content.with_name("pytorch_model.bin").write_bytes(b"")


DENSE = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}


@pytest.mark.parametrize("sides", [("base", "tuned"), ("base",), ("tuned",)])
@pytest.mark.parametrize("place", ["2_Dense", ""])
def test_a_module_only_in_another_format_is_refused(
    tmp_path: Path, place: str, sides: tuple[str, ...]
) -> None:
    """The output would have base's other modules and lack this one."""
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        folder = model(tmp_path / name, value, DENSE)
        if name in sides:
            pickled(folder / place)
    wanted = rf"{sides[0]}{'/' if place else ''}{place} has its weights only in pytorch_model\.bin"
    with pytest.raises(RefineFastError, match=wanted):
        rf.fuse(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_module_only_in_another_format_beside_an_adapter_is_refused(tmp_path: Path) -> None:
    base = model(tmp_path / "base", 0.0, DENSE)
    tuned = model(tmp_path / "tuned", 1.0, DENSE)
    pickled(tuned / "2_Dense")
    (tuned / "model.safetensors").unlink()
    (tuned / "adapter_config.json").write_text("{}")
    with pytest.raises(RefineFastError, match="2_Dense has its weights only in pytorch_model"):
        rf.fuse(base, tuned, tmp_path / "out")


@pytest.mark.parametrize("modules", [None, DENSE, {"0_Transformer": "Transformer"}])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_weights_of_no_module_are_left_out(
    tmp_path: Path, modules: dict[str, str] | None, side: str
) -> None:
    """A trainer's checkpoints, and the original files of some published models; a folder in which
    nothing could be read takes no part either."""
    base = model(tmp_path / "base", 0.0, modules)
    tuned = model(tmp_path / "tuned", 1.0, modules)
    model(tmp_path / side / "checkpoint-5", 7.0)
    (tmp_path / side / "original").mkdir()
    for i in range(2):
        (tmp_path / side / "original" / f"consolidated.{i}.safetensors").write_bytes(b"")
    report = rf.fuse(base, tuned, tmp_path / "out", 0.5)
    written = sorted((tmp_path / "out").rglob("*.safetensors"))
    assert len(written) == (2 if modules is DENSE else 1)
    for file in written:
        assert torch.equal(load_file(file)["w"], HALF["w"]), file
    assert "checkpoint-5/model.safetensors" in str(report)
    assert ("checkpoint-5/model.safetensors" in report.left_out) == (side == "base")


def test_weights_below_a_module_are_its_own(tmp_path: Path) -> None:
    """sentence-transformers 4 keeps the parts of a router so, and names them in a config.json."""
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        folder = model(tmp_path / name, value, {"": "Transformer", "1_Asym": "Asym"})
        model(folder / "1_Asym" / "query_Dense", value)
    report = rf.fuse(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 0.5)
    assert "1_Asym/query_Dense/w" in report.tensors


def test_the_index_of_transformers_is_taken_of_two(tmp_path: Path) -> None:
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        for stem, filled in (("model", value), ("consolidated", 9.0)):
            shard = f"{stem}-00001-of-00001.safetensors"
            save_file({"w": torch.full((2, 2), filled)}, folder / shard)
            index = {"weight_map": {"w": shard}}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    report = rf.fuse(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", 0.5)
    assert report.left_out == [
        "consolidated-00001-of-00001.safetensors",
        "consolidated.safetensors.index.json",
    ]
    shard = tmp_path / "out" / "model-00001-of-00001.safetensors"
    assert torch.equal(load_file(shard)["w"], HALF["w"])
