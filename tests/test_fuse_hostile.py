"""What a checkpoint from an enemy, or a mistake, must not do: crash, read outside its file, or
leave anything behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import refine_fast as rf
from refine_fast.errors import RefineFastError
from refine_fast.fuse.checkpoint import read_checkpoint, read_header


def safetensors_file(
    path: Path, header: object, data: bytes = b"", *, length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(
    dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# The cases of the reference implementation's SafeTensorError and of its attacks/ folder, and the
# keys that it lets through twice.
MALFORMED: dict[str, tuple[Any, bytes, str]] = {
    "header without brace": (b'["a"]', b"", "start with '{'"),
    "header after a byte order mark": (b"\xef\xbb\xbf{}", b"", "start with '{'"),
    "header of white space": (b" \n", b"", "start with '{'"),
    "header not UTF-8": (b'{"\xff": 1}', b"", "malformed"),
    "header not JSON": (b"{", b"", "malformed"),
    "header padded with zeros": (b"{}\0\0", b"", "malformed"),
    "unpaired surrogate": (
        b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        bytes(8),
        "malformed",
    ),
    "deep nesting": (b'{"a":' + b"[" * 200_000, b"", "nested too deeply"),
    "long number": (
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,1]}}',
        bytes(1),
        "malformed",
    ),
    "not a number": (
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}',
        bytes(1),
        "malformed",
    ),
    "number out of range": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"new":1e400}}',
        b"",
        "malformed",
    ),
    "minus zero": (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', b"", "malformed"),
    "duplicate tensor": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
        "'a' occurs twice",
    ),
    "duplicate field": (
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        bytes(1),
        "'dtype' occurs twice",
    ),
    "entry not an object": ({"a": [1]}, b"", "lacks one of"),
    "field missing": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "lacks one of"),
    "unknown dtype": ({"a": entry("F33")}, bytes(8), "unknown dtype"),
    "dtype not a string": ({"a": entry(["F32"])}, bytes(8), "unknown dtype"),
    "negative size": ({"a": entry(shape=[-2])}, bytes(8), "has the shape"),
    "fractional size": ({"a": entry(shape=[2.0])}, bytes(8), "has the shape"),
    "truth as size": ({"a": entry(shape=[True, 2])}, bytes(8), "has the shape"),
    "shape not a list": ({"a": entry(shape=2)}, bytes(8), "has the shape"),
    "size beyond 64 bits": ({"a": entry(shape=[2**64])}, bytes(8), "has the shape"),
    "product overflows 64 bits": (
        {"a": entry(shape=[2**32, 2**32, 2], offsets=[0, 0])},
        b"",
        "has the shape",
    ),
    "product overflows a double": ({"a": entry(shape=[2**62] * 20)}, bytes(8), "has the shape"),
    "a shape that takes hours to multiply": (
        {"a": entry(shape=[2**62] * 1_000_000)},
        bytes(8),
        "has the shape",
    ),
    "offsets reversed": (
        {"a": entry(offsets=[8, 0])},
        bytes(8),
        "takes 8 bytes, but its data_offsets span -8",
    ),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, bytes(8), "has the data_offsets"),
    "offsets of text": ({"a": entry(offsets=["0", "8"])}, bytes(8), "has the data_offsets"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, bytes(8), "has the data_offsets"),
    "span unlike shape": ({"a": entry(offsets=[0, 7])}, bytes(8), "takes 8 bytes"),
    "half a byte": ({"a": entry("F4", [3], [0, 1])}, bytes(1), "takes 1.5 bytes"),
    "beyond the end": ({"a": entry(offsets=[0, 8])}, bytes(7), "its tensors end at"),
    "bytes left over": ({"a": entry(offsets=[0, 8])}, bytes(9), "its tensors end at"),
    "hole": ({"a": entry(offsets=[0, 8]), "b": entry(offsets=[9, 17])}, bytes(17), "'b' starts at"),
    "overlap": (
        {"a": entry(offsets=[0, 8]), "b": entry(offsets=[4, 12])},
        bytes(12),
        "'b' starts at",
    ),
    "two tensors in one place": ({"a": entry(), "b": entry()}, bytes(8), "starts at"),
    "first hole": ({"a": entry(offsets=[8, 16])}, bytes(16), "'a' starts at"),
    "metadata no map": ({"__metadata__": [1], "a": entry()}, bytes(8), "__metadata__"),
    "metadata an empty list": ({"__metadata__": [], "a": entry()}, bytes(8), "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_safetensors(tmp_path: Path, case: str) -> None:
    header, data, message = MALFORMED[case]
    good = tmp_path / "good.safetensors"
    save_file({"a": torch.zeros(2)}, good)
    bad = safetensors_file(tmp_path / "bad.safetensors", header, data)
    for base, tuned in ((good, bad), (bad, good)):
        with pytest.raises(RefineFastError) as error:
            rf.fuse(base, tuned, tmp_path / "out.safetensors")
        assert message in str(error.value)
        assert "bad.safetensors" in str(error.value)
        assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["bad.safetensors", "good.safetensors"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "less than the 8"),
        (b"1234567", "less than the 8"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "more than the 100000000"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "more than the 100000000"),
        ((3).to_bytes(8, "little") + b"{}", "the file ends after"),
        ((0).to_bytes(8, "little"), "start with"),
    ],
)
def test_header_length(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(RefineFastError, match=message):
        read_header(tmp_path / "a.safetensors")


def test_valid_oddities_are_read(tmp_path: Path) -> None:
    """No tensors at all; an empty tensor between two others; fields that a later version may add;
    trailing spaces."""
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(offsets=[0, 8]),
        "e": entry(shape=[0, 3], offsets=[8, 8]),
        "c": {**entry("F4", [2], [8, 9]), "new": 1},
    }
    found = read_header(
        safetensors_file(tmp_path / "a.safetensors", json.dumps(header).encode() + b"   ", bytes(9))
    )
    assert [e.name for e in found.entries] == ["b", "e", "c"]
    for name in ("n", "m"):
        safetensors_file(tmp_path / f"{name}.safetensors", {})
    rf.fuse(tmp_path / "n.safetensors", tmp_path / "m.safetensors", tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors") == {}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two models in two shards each, and a file outside that no index may reach."""
    save_file({"secret": torch.ones(2)}, tmp_path / "secret.safetensors")
    for i, name in enumerate(("base", "tuned")):
        folder = tmp_path / name
        folder.mkdir()
        save_file(
            {"embed.weight": torch.full((8, 4), float(i)), "a": torch.zeros(3)},
            folder / "1.safetensors",
        )
        save_file({"b": torch.zeros(3)}, folder / "2.safetensors")
        index = {
            "weight_map": {
                "embed.weight": "1.safetensors",
                "a": "1.safetensors",
                "b": "2.safetensors",
            }
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path / "base", tmp_path / "tuned"


def assert_refused(folders: tuple[Path, Path], message: str) -> None:
    before = sorted(os.listdir(folders[0].parent))
    with pytest.raises(RefineFastError, match=message) as error:
        rf.fuse(*folders, folders[0].parent / "out")
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(folders[0].parent)) == before


@pytest.mark.parametrize(
    "target",
    [
        "../secret.safetensors",
        "{tmp}/secret.safetensors",
        "..",
        "sub/1.safetensors",
        "a\\b",
        "link.safetensors",
        "",
        "x\0y",
    ],
)
def test_index_stays_in_its_folder(folders: tuple[Path, Path], target: str) -> None:
    target = target.format(tmp=folders[0].parent)
    (folders[1] / "link.safetensors").symlink_to(folders[0].parent / "secret.safetensors")
    (folders[1] / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"secret": target}})
    )
    assert_refused(folders, "points outside its folder|leaves the model's folder")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"[]", "no weight_map"),
        (b"{", "not a valid index"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": {"a": 1}}', "no weight_map"),
        (b'{"weight_map": {"a": "1.safetensors"}, "metadata": [1]}', "metadata that is not a map"),
        (b'{"weight_map": {"a": "' + b"x" * 300 + b'"}}', "which is missing"),
        (b'{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}', "'a' occurs twice"),
        (b'{"weight_map": {"a": "3.safetensors"}}', "'3.safetensors', which is missing"),
        (
            b'{"weight_map": {"a": "2.safetensors", "embed.weight": "1.safetensors"}}',
            "places tensor 'a' in '2.*in '1",
        ),
        (
            b'{"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}',
            "'c' in '2.safetensors', but no shard has it",
        ),
    ],
)
def test_malformed_index(folders: tuple[Path, Path], index: bytes, message: str) -> None:
    (folders[1] / "model.safetensors.index.json").write_bytes(index)
    assert_refused(folders, message)


def test_models_that_do_not_fit(folders: tuple[Path, Path]) -> None:
    tuned = folders[1]
    save_file({"embed.weight": torch.zeros(9, 4), "a": torch.zeros(3)}, tuned / "1.safetensors")
    assert_refused(
        folders, r"'embed.weight' is \[8, 4\] in .*base.*\[9, 4\] in .*tuned.*vocabularies differ"
    )
    save_file({"embed.weight": torch.zeros(4, 8), "a": torch.zeros(3)}, tuned / "1.safetensors")
    assert_refused(folders, r"'embed.weight' is \[8, 4\].*architectures differ")
    save_file(
        {"embed.weight": torch.zeros(8, 4, dtype=torch.int8), "a": torch.zeros(3)},
        tuned / "1.safetensors",
    )
    assert_refused(folders, "'embed.weight' is F32 in .* but I8 in .*dequantize")
    (tuned / "model.safetensors.index.json").unlink()
    assert_refused(folders, "2 safetensors files and 0 indexes")
    (tuned / "2.safetensors").unlink()
    assert_refused(folders, "tuned lacks the tensor 'b'")
    save_file(
        {
            "embed.weight": torch.zeros(8, 4),
            "a": torch.zeros(3),
            "b": torch.zeros(3),
            "c": torch.zeros(3),
        },
        tuned / "1.safetensors",
    )
    assert_refused(folders, "base lacks the tensor 'c'")
    content = (tuned / "1.safetensors").read_bytes()
    (tuned / "1.safetensors").write_bytes(content[:-1])
    assert_refused(folders, "its tensors end at")
    (tuned / "1.safetensors").unlink()
    assert_refused(folders, "has no weights")
    (tuned / "pytorch_model.bin").write_bytes(b"")
    assert_refused(folders, "convert them with")


def test_outputs_that_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = folders
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a_file").write_text("mine")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    for out in (
        base,
        tuned,
        tmp_path,
        base / "out",
        tmp_path / "link",
        tmp_path / "link" / "out",
        tmp_path / "loop",
        tmp_path / "x" / ".." / "base",
    ):
        with pytest.raises(RefineFastError, match=r"contain each other|is a link"):
            rf.fuse(base, tuned, out, overwrite=True)
    with pytest.raises(RefineFastError, match="exists: give another"):
        rf.fuse(base, tuned, tmp_path / "full")
    with pytest.raises(RefineFastError, match="is already a file"):
        rf.fuse(base, tuned, tmp_path / "a_file", overwrite=True)
    for second in (tmp_path / "o", tmp_path / "o" / "in"):
        with pytest.raises(RefineFastError, match="its own output"):
            rf.fuse_sweep(base, tuned, {0.1: tmp_path / "o", 0.2: second})
    for weight in (float("nan"), float("inf"), "0.35"):
        with pytest.raises(RefineFastError, match="weight must be a finite number"):
            rf.fuse(base, tuned, tmp_path / "o", weight)  # type: ignore[arg-type]
    with pytest.raises(RefineFastError, match=r"dtype must be one of .* \(got 'INT8'\)"):
        rf.fuse(base, tuned, tmp_path / "o", dtype="INT8")
    for nowhere in (tmp_path / "nowhere", tmp_path / ("x" * 300)):
        with pytest.raises(RefineFastError, match="does not exist"):
            rf.fuse(nowhere, tuned, tmp_path / "o")
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_link_does_not_publish_what_it_points_to(folders: tuple[Path, Path]) -> None:
    secret = folders[0].parent / "secret"
    secret.write_text("key")
    (folders[0] / "notes.txt").symlink_to(secret)
    assert_refused(folders, r"base/notes\.txt is a link that leaves the model's folder")


@pytest.mark.parametrize("kind", ["broken link", "pipe"])
def test_every_file_of_base_can_be_copied(folders: tuple[Path, Path], kind: str) -> None:
    """Known before the weights are written, and not after hours of it."""
    (folders[0] / "vocab.txt").symlink_to("nowhere") if kind == "broken link" else os.mkfifo(
        folders[0] / "vocab.txt"
    )
    assert_refused(folders, r"base/vocab\.txt cannot be read, and every file of base is copied")


def test_a_folder_that_may_not_be_listed(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is not written without the module in it."""
    (folders[0] / "2_Dense").mkdir()
    listing = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("2_Dense"):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert_refused(folders, "cannot read .*2_Dense: Permission denied")


def test_the_hugging_face_cache_is_followed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """snapshots/<revision>/file -> ../../blobs/<hash> is the one link that a model folder has by
    right."""
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1f", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folders[1].iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    rf.fuse(folders[0], snapshot, tmp_path / "out", 1.0)
    assert load_file(tmp_path / "out" / "1.safetensors")["embed.weight"].eq(1).all()


# Fuzzing: scripts of edits to a valid header and index, so that most inputs pass the first check.

FUZZ = int(os.environ.get("REFINE_FAST_FUZZ", "1000"))

VALID = json.dumps(
    {"a": entry(), "b": entry("I64", [1], [8, 16]), "__metadata__": {"format": "pt"}}
).encode()
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"1", b"8", b"-0", b"-1",
    b"18446744073709551616", b"1e400", b"[]", b"null", b"true", b'"a"', b'"b"', b'"F32"',
    b'"dtype"', b'"shape"', b'"data_offsets"', b"\xff", b"\\u0000", b"\0", b" ",
    b"\t\r\n",
]  # fmt: skip
EDIT = st.tuples(
    st.integers(0, len(VALID) - 1),
    st.integers(0, 8),
    st.sampled_from(TOKENS) | st.binary(max_size=4),
)


def assert_one_line(error: RefineFastError) -> None:
    assert "\n" not in str(error)


def mutate(text: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for at, dropped, put in edits:
        at %= max(len(text), 1)
        text = text[:at] + put + text[at + dropped :]
    return text


PADDING = st.lists(
    st.sampled_from([b" ", b"\t", b"\n", b"\r"])
    | st.sampled_from([b"\0", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xc2\xa0", b"\xef\xbb\xbf"]),
    max_size=3,
).map(b"".join)


@settings(
    max_examples=FUZZ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(PADDING, PADDING)
def test_padded_headers(tmp_path: Path, before: bytes, after: bytes) -> None:
    """Read and copied where the reference implementation reads them, and only there."""
    path = safetensors_file(tmp_path / "a.safetensors", before + VALID + after, bytes(16))
    try:
        safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError:
        with pytest.raises(RefineFastError) as error:
            read_header(path)
        assert_one_line(error.value)
        return
    out = tmp_path / "out.safetensors"
    rf.fuse(path, path, out, overwrite=True)
    assert out.read_bytes() == path.read_bytes()


@settings(
    max_examples=FUZZ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(st.lists(EDIT, max_size=4), st.integers(-2, 2), st.integers(-2, 2))
def test_fuzzed_headers(
    tmp_path: Path, edits: list[tuple[int, int, bytes]], longer: int, more: int
) -> None:
    """Any header is refused with one sentence, or the reference implementation reads it too, every
    tensor of it lies inside the file, and fuse writes its bytes."""
    text = mutate(VALID, edits)
    path = safetensors_file(
        tmp_path / "a.safetensors", text, bytes(16 + more), length=max(len(text) + longer, 0)
    )
    try:
        header = read_header(path)
    except RefineFastError as error:
        assert_one_line(error)
        return
    safetensors.deserialize(path.read_bytes())
    size = path.stat().st_size
    assert all(8 < e.offset <= e.offset + e.nbytes <= size for e in header.entries)
    out = tmp_path / "out.safetensors"
    rf.fuse(path, path, out, overwrite=True)
    assert out.read_bytes() == path.read_bytes()


@settings(
    max_examples=FUZZ // 5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(st.lists(EDIT, min_size=1, max_size=4))
def test_fuzzed_indexes(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "2.safetensors")
    text = mutate(
        b'{"metadata": {"total_size": 16},'
        b' "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}',
        edits,
    )
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    try:
        found = read_checkpoint(tmp_path)
    except RefineFastError as error:
        assert_one_line(error)
    else:
        assert all(path.parent == tmp_path for path in found.files())
