"""fuse from file to file: the output equals the reference, byte for byte, and everything else stays
as it was."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import refine_fast as rf
from refine_fast import reference
from refine_fast.cli import main
from refine_fast.errors import RefineFastError, RefineFastWarning
from refine_fast.fuse import merge

Tensors = dict[str, torch.Tensor]


def tensors(seed: int, scale: float = 1.0) -> Tensors:
    """A small model: a vector, a matrix, an empty tensor, a scalar, a buffer of integers; every
    float type."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)

    return {
        "embeddings.word_embeddings.weight": draw(1000, 37),
        "embeddings.position_ids": torch.arange(64)[None],
        "layer.0.weight": draw(37, 37, dtype=torch.bfloat16),
        "layer.0.bias": draw(37, dtype=torch.float16),
        "layer.1.weight": draw(5, 3, dtype=torch.float64),
        "layer.1.scale": draw(1)[0],
        "layer.1.empty": draw(0, 8),
        "layer.2.weight": draw(64, 8).to(torch.float8_e4m3fn),
    }


def expected(base: Tensors, tuned: Tensors, weight: float) -> Tensors:
    return {
        name: reference.lerp(t, tuned[name], weight) if t.is_floating_point() else t
        for name, t in base.items()
    }


def raw(t: torch.Tensor) -> bytes:
    return t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert found[name].dtype == t.dtype
        assert found[name].shape == t.shape
        assert raw(found[name]) == raw(t), name


def save_folder(folder: Path, content: Tensors, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    if shards == 1:
        save_file(content, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(content)}
    for file in names:
        save_file(
            {name: t for name, t in content.items() if weight_map[name] == file},
            folder / file,
            {"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder


def load_folder(folder: Path) -> Tensors:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    save_file(tensors(0), tmp_path / "base.safetensors", {"format": "pt"})
    save_file(tensors(1), tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


@pytest.mark.parametrize("weight", [0, 0.35, np.float32(0.5), 1.0])
def test_single_file(isa: str, pair: tuple[Path, Path], tmp_path: Path, weight: float) -> None:
    report = rf.fuse(*pair, tmp_path / "out.safetensors", weight)
    found = load_file(tmp_path / "out.safetensors")
    assert_equal(found, expected(tensors(0), tensors(1), weight))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert report.copied == ["embeddings.position_ids"]
    assert report.tensors.keys() == found.keys() - {"embeddings.position_ids"}
    for name, change in report.tensors.items():
        base = tensors(0)[name].double()
        moved, size = (found[name].double() - base).norm().item(), base.norm().item()
        # csrc/isa sums up to 1,024 squares in float32, within 1e-5 of them
        assert (change.norm, change.relative) == pytest.approx(
            (moved, moved / size if size else 0.0), rel=1e-5
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base.safetensors",
        "out.safetensors",
        "tuned.safetensors",
    ]


@pytest.mark.parametrize("shards", [1, 3])
def test_folder(tmp_path: Path, shards: int) -> None:
    base, tuned = (
        save_folder(tmp_path / "base", tensors(0), shards),
        save_folder(tmp_path / "tuned", tensors(1), 2),
    )
    (base / "pytorch_model.bin").write_bytes(b"stale")
    (tuned / "config.json").write_text("not base's")
    report = rf.fuse(base, tuned, tmp_path / "new" / "out", 0.35)
    out = tmp_path / "new" / "out"
    assert_equal(load_folder(out), expected(tensors(0), tensors(1), 0.35))
    files = {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()}
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == files - {
        "pytorch_model.bin"
    }
    assert report.left_out == ["pytorch_model.bin"]
    for name in files - {"pytorch_model.bin"}:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (base / name).read_bytes()
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    base, tuned = (
        save_folder(tmp_path / "base", tensors(0)),
        save_folder(tmp_path / "tuned", tensors(1)),
    )
    before = os.umask(0o027)
    try:
        rf.fuse(base, tuned, tmp_path / "out")
    finally:
        os.umask(before)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


def test_other_order_and_odd_header(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """tuned keeps its tensors in another order, behind a header whose odd length misaligns every
    element."""
    content = tensors(1)
    data, entries = b"", {}
    for name in sorted(content, reverse=True):
        block = raw(content[name])
        dtype = {
            "torch.float32": "F32",
            "torch.bfloat16": "BF16",
            "torch.float16": "F16",
            "torch.float64": "F64",
            "torch.int64": "I64",
        }
        entries[name] = {
            "dtype": dtype.get(str(content[name].dtype), "F8_E4M3"),
            "shape": list(content[name].shape),
            "data_offsets": [len(data), len(data) + len(block)],
        }
        data += block
    text = json.dumps(entries).encode()
    text += b" " * (1 - len(text) % 2)
    pair[1].write_bytes(len(text).to_bytes(8, "little") + text + data)
    rf.fuse(*pair, tmp_path / "out.safetensors", checksum=True)
    assert_equal(load_file(tmp_path / "out.safetensors"), expected(tensors(0), content, 0.35))


def test_checksums(tmp_path: Path) -> None:
    base, tuned = (
        save_folder(tmp_path / "base", tensors(0), 2),
        save_folder(tmp_path / "tuned", tensors(1), 3),
    )
    reports = rf.fuse_sweep(base, tuned, {0.2: tmp_path / "a", 0.8: tmp_path / "b"}, checksum=True)
    for report in reports.values():
        assert len(report.sha256) == 2 + 3 + 2
        for path, digest in report.sha256.items():
            assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest, path


def test_sweep_equals_single_merges(tmp_path: Path) -> None:
    base, tuned = (
        save_folder(tmp_path / "base", tensors(0), 2),
        save_folder(tmp_path / "tuned", tensors(1), 2),
    )
    rf.fuse_sweep(base, tuned, {w: tmp_path / f"{w}" for w in (0.2, 0.35, 0.8)})
    for weight in (0.2, 0.35, 0.8):
        assert_equal(load_folder(tmp_path / f"{weight}"), expected(tensors(0), tensors(1), weight))


@pytest.mark.parametrize(("threads", "overlap"), [(None, True), (1, False), (2, True), (7, True)])
def test_threads_decide_whether_reads_overlap(
    threads: int | None,
    overlap: bool,
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = []

    def spy(*arguments: Any) -> Any:
        files, pieces, factors, outputs, flag, on_block = arguments
        flags.append(flag)
        return stream(files, pieces, factors, outputs, flag, on_block)

    stream = merge._core.stream
    monkeypatch.setattr(merge._core, "stream", spy)
    rf.fuse(*pair, tmp_path / "out.safetensors", 0.35, threads=threads)
    assert set(flags) == {overlap}
    found = load_file(tmp_path / "out.safetensors")
    assert_equal(found, expected(tensors(0), tensors(1), 0.35))


@pytest.mark.parametrize("threads", [0, -1, 2.5, True, "2"])
def test_threads_that_make_no_sense(threads: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    message = rf"threads must be None or an integer >= 1 \(got {threads!r}\)"
    with pytest.raises(RefineFastError, match=message):
        rf.fuse(*pair, tmp_path / "out.safetensors", threads=threads)
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_by_glob(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = rf.fuse(
        *pair, tmp_path / "out.safetensors", 0.35, weights={"layer.0.*": 0.0, "layer.*": 1.0}
    )
    wanted = expected(tensors(0), tensors(1), 0.35) | {
        name: t if name.startswith("layer.0") else tensors(1)[name]
        for name, t in tensors(0).items()
        if name.startswith("layer")
    }
    assert_equal(load_file(tmp_path / "out.safetensors"), wanted)
    assert report.tensors["layer.0.bias"].weight == 0.0
    with pytest.raises(RefineFastError, match=r"'layr\.\*' matches no tensor"):
        rf.fuse(*pair, tmp_path / "out2.safetensors", weights={"layr.*": 0.5})


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64", "F8_E5M2"])
def test_output_dtype(pair: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    rf.fuse(*pair, tmp_path / "out.safetensors", 0.35, dtype=dtype)
    target = {
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F64": torch.float64,
        "F8_E5M2": torch.float8_e5m2,
    }[dtype]
    wanted = {}
    for name, t in tensors(0).items():
        if t.is_floating_point():
            # one rounding, from the width of the arithmetic
            wide = torch.float64 if t.dtype == torch.float64 else torch.float32
            t = reference.lerp(t.to(wide), tensors(1)[name].to(wide), 0.35).to(target)
        wanted[name] = t
    assert_equal(load_file(tmp_path / "out.safetensors"), wanted)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [("F32", "float32"), ("F16", "float16"), ("F64", "float64"), ("BF16", "bfloat16"),
     ("F8_E5M2", None), (None, None)],
)  # fmt: skip
def test_output_dtype_in_config_json(tmp_path: Path, dtype: str | None, said: str | None) -> None:
    """Wherever it is written; else transformers would load the model in base's."""
    config = '{"dtype" :\n "float8", "text_config": {"torch_dtype": "float8"}, "eps": 1.0}'
    for i, side in enumerate(("base", "tuned")):
        for folder in (tmp_path / side, tmp_path / side / "1_Dense"):
            folder.mkdir()
            save_file({"a": torch.full((8,), float(i))}, folder / "model.safetensors")
            (folder / "config.json").write_text(config)
        listed = [{"path": "", "type": "Transformer"}, {"path": "1_Dense", "type": "Dense"}]
        (tmp_path / side / "modules.json").write_text(json.dumps(listed))
    rf.fuse(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", dtype=dtype)
    for folder in (tmp_path / "out", tmp_path / "out" / "1_Dense"):
        assert (folder / "config.json").read_text() == config.replace("float8", said or "float8")


def test_windows_and_shards_of_many_megabytes(tmp_path: Path) -> None:
    """Tensors larger than the windows of 8 MiB, with ragged ends, and a window that begins inside a
    tensor."""
    g = torch.Generator().manual_seed(0)
    base = {
        f"t{i}": torch.randn(n, generator=g)
        for i, n in enumerate([3_000_001, 5, 2_097_152, 1_999_999])
    }
    tuned = {name: t + 0.01 * torch.randn(len(t), generator=g) for name, t in base.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(
        {name: t.to(torch.bfloat16) for name, t in tuned.items()}, tmp_path / "tuned.safetensors"
    )
    seen: list[tuple[int, int]] = []
    rf.fuse(
        tmp_path / "base.safetensors",
        tmp_path / "tuned.safetensors",
        tmp_path / "out.safetensors",
        progress=lambda *x: seen.append(x),
    )
    assert_equal(
        load_file(tmp_path / "out.safetensors"),
        expected(base, {n: t.to(torch.bfloat16) for n, t in tuned.items()}, 0.35),
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == (tmp_path / "out.safetensors").stat().st_size


def test_nan_and_unequal_buffers_are_reported(
    isa: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    content = tensors(1)
    content["layer.0.weight"][3, 4] = torch.nan
    content["layer.0.bias"][:2] = torch.inf
    content["embeddings.position_ids"][0, 0] = 7
    save_file(content, pair[1])
    with pytest.warns(RefineFastWarning) as warned:
        report = rf.fuse(*pair, tmp_path / "out.safetensors")
    assert report.unequal == ["embeddings.position_ids"]
    assert {name: report.tensors[name].not_finite for name in report.not_finite} == {
        "layer.0.weight": 1,
        "layer.0.bias": 2,
    }
    assert len(warned) == 2
    with pytest.warns(RefineFastWarning) as by_sweep:
        rf.fuse_sweep(*pair, {0.1: tmp_path / "1.safetensors", 0.2: tmp_path / "2.safetensors"})
    assert {w.filename for w in (*warned, *by_sweep)} == {__file__}
    assert "layer.0.weight" in str(report)


def test_a_weight_of_0_or_1_keeps_what_is_finite(tmp_path: Path) -> None:
    """Above all ``weights={"layer": 0}``, which is to keep a tensor of base."""
    ones, wild = {"a": torch.ones(4), "b": torch.ones(4)}, torch.tensor([torch.nan, torch.inf] * 2)
    save_file(ones, tmp_path / "ones.safetensors")
    save_file({"a": wild, "b": torch.zeros(4)}, tmp_path / "wild.safetensors")
    for base, tuned, weight in (("ones", "wild", 0), ("wild", "ones", 1)):
        report = rf.fuse(
            tmp_path / f"{base}.safetensors",
            tmp_path / f"{tuned}.safetensors",
            tmp_path / "out.safetensors",
            weights={"a": weight},
            overwrite=True,
        )
        assert report.not_finite == []
        assert torch.equal(load_file(tmp_path / "out.safetensors")["a"], ones["a"])


def test_float16_overflow_is_seen_after_rounding(tmp_path: Path) -> None:
    save_file({"w": torch.full((4,), 1.0)}, tmp_path / "a.safetensors")
    save_file({"w": torch.full((4,), 1e6)}, tmp_path / "b.safetensors")
    with pytest.warns(RefineFastWarning, match="infinite"):
        report = rf.fuse(
            tmp_path / "a.safetensors",
            tmp_path / "b.safetensors",
            tmp_path / "c.safetensors",
            1.0,
            dtype="F16",
        )
    assert report.tensors["w"].not_finite == 4


def test_progress_can_stop_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rf.fuse(*pair, tmp_path / "out.safetensors", progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]


def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("base", "tuned")):
        save_folder(tmp_path / name, tensors(seed))
    command = [
        "fuse",
        str(tmp_path / "base"),
        str(tmp_path / "tuned"),
        "-o",
        str(tmp_path / "out"),
        "--weight",
        "0.6",
    ]
    assert (
        main(
            [
                *command,
                "--weights",
                "embeddings.*=0",
                "--weights",
                "*.bias=1",
                "--checksum",
                "--json",
            ]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    base, tuned, out = (
        load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned", "out")
    )
    by_hand = {"embeddings.word_embeddings.weight": 0.0, "layer.0.bias": 1.0}
    assert_equal(
        out,
        {
            name: expected({name: t}, tuned, by_hand.get(name, 0.6))[name]
            for name, t in base.items()
        },
    )
    written = tmp_path / "out" / "model.safetensors"
    assert result["sha256"][str(written)] == hashlib.sha256(written.read_bytes()).hexdigest()
    assert result["tensors"]["layer.0.bias"]["weight"] == 1
    tuned["layer.0.bias"] = torch.full_like(tuned["layer.0.bias"], math.nan)
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    assert main([*command, "--overwrite", "--json"]) == 0
    changes = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["tensors"]
    assert changes["layer.0.bias"] == {
        "weight": 0.6,
        "norm": None,
        "relative": None,
        "not_finite": tensors(0)["layer.0.bias"].numel(),
    }
    assert main([*command]) == 2
    assert (
        "exists: give another, or pass overwrite=True (--overwrite) to replace it"
        in capsys.readouterr().err
    )
    for sent, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        monkeypatch.setattr(merge._Merge, "run", lambda _, sent=sent: signal.raise_signal(sent))
        assert main([*command, "--overwrite"]) == code
        assert capsys.readouterr().err == "error: stopped; nothing was left at --out.\n"
        assert sorted(os.listdir(tmp_path)) == ["base", "out", "tuned"]
    with pytest.raises(SystemExit):
        main([*command, "--weights", "layer.*"])
    assert "'layer.*' must be GLOB=W, such as '*.embeddings.*=0'" in capsys.readouterr().err
