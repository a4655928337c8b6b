"""The architecture as checks: imports run one way, the include rules of csrc hold, the ISA objects leak no symbol, the stub is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import those of a lower rank only.
RANKS = [
    {"errors", "files", "_core", "_cuda", "reference", "workspace"},
    {"_native"},
    {"triton_kernels"},
    {"ops"},
    {"nn", "mine", "fuse"},
    {"integrations"},
    {"pipeline"},
    {"cli", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
HEAVY = ["triton", "transformers", "faiss", "sentence_transformers", "datasets", "openai", "matplotlib", "rich"]


def room(path: Path) -> str:
    return path.relative_to(ROOT / "refine_fast").parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[str, ...]]:
    """The names that a file imports, wherever in the file: ("refine_fast", "ops", "lerp", "lerp_")."""
    package = ("refine_fast", *path.relative_to(ROOT / "refine_fast").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        found.update(names)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "refine_fast").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    for other in {name[1] for name in imports(path) if name[0] == "refine_fast" and len(name) > 1} & RANK.keys():
        assert other == own or RANK[other] < RANK[own], f"{path.name} ({own}) must not import {other}"


def test_no_two_files_import_one_another() -> None:
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in (ROOT / "refine_fast").rglob("*.py")}
    taken = {file: {name[:n] for name in imports(path) for n in range(2, 5)} & files.keys() for file, path in files.items()}
    TopologicalSorter(taken).prepare()  # CycleError names the circle


def test_every_room_has_a_rank() -> None:
    rooms = {room(p) for p in (ROOT / "refine_fast").rglob("*.py")} - {"__init__"}
    assert rooms <= RANK.keys()


# What the files of each folder may include. Only kernels/ is shared by the ISA levels and the algorithms.
_STANDARD = r"[a-z_0-9]+"
_POSIX = r"cpuid\.h|omp\.h|pthread\.h|sys/[a-z_]+\.h|unistd\.h|fcntl\.h|errno\.h|linux/[a-z_]+\.h"
INCLUDES = {
    "csrc/kernels": r"kernels/[a-z_0-9]+\.h|cstdint",
    "csrc/isa": r"immintrin\.h|arm_neon\.h|kernels/[a-z_0-9]+\.h|isa/[a-z_0-9]+\.h|cstdint|cstddef",
    "csrc/core": rf"core/[a-z_0-9]+\.h|kernels/[a-z_0-9]+\.h|{_STANDARD}|{_POSIX}",
    "csrc/cuda": rf"kernels/types\.h|core/numeric\.h|cuda/[a-z_0-9]+\.h|{_STANDARD}|cuda[a-z_0-9]*\.h|mma\.h",
    "csrc/bindings": r".*",
    "tests/cuda_emulation": rf"cuda_runtime\.h|machine\.h|ucontext\.h|{_STANDARD}",
}


@pytest.mark.parametrize(
    "path", sorted(p for folder in INCLUDES for p in (ROOT / folder).rglob("*.*")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_includes(path: Path) -> None:
    folder = "/".join(path.relative_to(ROOT).parts[:2])
    for include in re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text()):
        assert re.fullmatch(INCLUDES[folder], include), f"{path.name} must not include {include}"
        assert "torch" not in include
        assert folder == "csrc/bindings" or "pybind" not in include
        assert include != "omp.h" or path.name == "parallel.h"


def test_every_folder_of_csrc_has_include_rules() -> None:
    assert {f"csrc/{p.name}" for p in (ROOT / "csrc").iterdir()} <= INCLUDES.keys()


def test_no_source_file_is_over_500_lines() -> None:
    lengths = {p: len(p.read_text().splitlines()) for folder in INCLUDES for p in (ROOT / folder).rglob("*.*")}
    assert [f"{p.name}: {n}" for p, n in lengths.items() if n > 500] == []


def test_isa_objects_export_one_table_each() -> None:
    """A weak symbol compiled with AVX-512 can be merged into baseline code and crash an older CPU."""
    objects = sorted((ROOT / "build").rglob("refine_fast_isa.dir/csrc/isa/*.o"))
    if not objects:
        pytest.skip("no build tree here (a wheel install); .ci/run installs editable and checks it")
    for path in objects:
        table = subprocess.run(["nm", "--defined-only", "--extern-only", path], check=True, capture_output=True, text=True).stdout
        symbols = [line.split()[1:] for line in table.splitlines()]
        level = path.name.removesuffix(".cc.o")
        assert [kind for kind, _ in symbols if kind in "WVu"] == [], f"{path.name} has weak symbols: {symbols}"
        assert [name for _, name in symbols] == [f"_ZN11refine_fast{len(level) + 8}{level}_kernelsE"], f"{path.name} exports {symbols}"


def test_stub_names_the_extension() -> None:
    from refine_fast import _core

    tree = ast.parse((ROOT / "refine_fast" / "_core.pyi").read_text())
    stub = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert stub == {name for name in dir(_core) if not name.startswith("__")}


def test_import_is_light() -> None:
    """No heavy package comes along, and what we add to torch's own import stays small."""
    script = f"import sys, refine_fast; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"
