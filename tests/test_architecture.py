"""The architecture as checks: imports run one way, csrc keeps its include rules, the ISA objects
leak no symbol, the stub matches the extension."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import those of a lower layer only.
LAYERS = [
    {"errors", "imports", "termination"},
    {"files", "_core", "_cuda", "reference", "workspace"},
    {"_native", "profiling", "collectives"},
    {"triton_kernels"},
    {"ops"},
    {"nn", "mine", "fuse"},
    {"integrations"},
    {"pipeline"},
    {"bench", "arguments"},
    {"cli"},
    {"__main__"},
]
# The rooms of pipeline/, likewise.
PIPELINE_LAYERS = [
    {"progress", "usage", "cache", "reserve", "workers", "ranks"},
    {"corpus", "sharded_search"},
    {"encoder"},
    {"queries"},
    {"training", "evaluation"},
    {"serving"},
    {"reporting"},
    {"artifacts", "config_values", "console", "code_version", "recipes", "cluster"},
    {"config_messages", "config_checks", "config_options"},
    {"config", "engine"},
    {"config_file", "context", "preflight"},
    {"stages"},
    {"runner"},
    {"commands"},
]
HEAVY = [
    "triton", "transformers", "faiss", "sentence_transformers", "datasets", "openai", "matplotlib",
    "rich", "pydantic", "ray", "fsspec",
]  # fmt: skip
MODULES = sorted((ROOT / "refine_fast").rglob("*.py"))


def layer_of(layers: list[set[str]]) -> dict[str, int]:
    return {name: number for number, names in enumerate(layers) for name in names}


def room(path: Path, folder: Path) -> str:
    return path.relative_to(folder).parts[0].removesuffix(".py")


def imports(path: Path) -> set[tuple[str, ...]]:
    """The names that a file imports, wherever in it: ("refine_fast", "ops", "lerp", "lerp_")."""
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


@pytest.mark.parametrize("layers", [LAYERS, PIPELINE_LAYERS], ids=["refine_fast", "pipeline"])
def test_imports_run_one_way(layers: list[set[str]]) -> None:
    """Also under TYPE_CHECKING: a type that only a higher layer has is in the wrong layer."""
    prefix = ("refine_fast",) if layers is LAYERS else ("refine_fast", "pipeline")
    folder, layer = ROOT.joinpath(*prefix), layer_of(layers)
    wrong = []
    for path in folder.rglob("*.py"):
        own = room(path, folder)
        if own == "__init__":
            continue
        depth = len(prefix)
        rooms = {
            name[depth] for name in imports(path) if name[:depth] == prefix and len(name) > depth
        }
        wrong += [
            f"{path.relative_to(ROOT)} must not import {other}"
            for other in rooms & layer.keys()
            if other != own and layer[other] >= layer[own]
        ]
    assert wrong == []


def test_no_two_files_import_one_another() -> None:
    files = {path.relative_to(ROOT).with_suffix("").parts: path for path in MODULES}
    taken = {
        file: {name[:n] for name in imports(path) for n in range(2, 6)} & files.keys() - {file}
        for file, path in files.items()
    }
    TopologicalSorter(taken).prepare()  # CycleError names the circle


@pytest.mark.parametrize("layers", [LAYERS, PIPELINE_LAYERS], ids=["refine_fast", "pipeline"])
def test_every_room_has_a_layer(layers: list[set[str]]) -> None:
    folder = ROOT / "refine_fast" if layers is LAYERS else ROOT / "refine_fast" / "pipeline"
    assert {room(p, folder) for p in folder.rglob("*.py")} - {"__init__"} <= layer_of(layers).keys()


def test_only_one_room_knows_ray_and_object_storage() -> None:
    cluster = ROOT / "refine_fast" / "pipeline" / "cluster"
    users = [p for p in MODULES if {"ray", "fsspec"} & {name[0] for name in imports(p)}]
    assert {path.parent for path in users} == {cluster}


def test_no_file_is_over_500_lines() -> None:
    folders = ("refine_fast", "csrc", "tests", "benchmarks")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in SOURCES]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert {name: lines for name, lines in lengths.items() if lines > 500} == {}


SOURCES = {".py", ".pyi", ".cc", ".h", ".cu", ".sh"}


# What the files of each folder may include. Only kernels/ is shared by the ISA levels and the
# algorithms.
_STANDARD = r"[a-z_0-9]+"
_POSIX = r"cpuid\.h|omp\.h|pthread\.h|sys/[a-z_]+\.h|unistd\.h|fcntl\.h|errno\.h|linux/[a-z_]+\.h"
INCLUDES = {
    "csrc/kernels": r"kernels/[a-z_0-9]+\.h|cstdint",
    "csrc/isa": r"immintrin\.h|arm_neon\.h|kernels/[a-z_0-9]+\.h|isa/[a-z_0-9]+\.h|cstdint|cstddef",
    "csrc/core": rf"core/[a-z_0-9]+\.h|kernels/[a-z_0-9]+\.h|{_STANDARD}|{_POSIX}",
    "csrc/cuda": r"kernels/types\.h|core/numeric\.h|cuda/[a-z_0-9]+\.h|"
    rf"{_STANDARD}|cuda[a-z_0-9]*\.h|mma\.h",
    "csrc/bindings": r".*",
    "tests/cuda_emulation": rf"cuda_runtime\.h|machine\.h|ucontext\.h|{_STANDARD}",
}


@pytest.mark.parametrize(
    "path",
    sorted(p for folder in INCLUDES for p in (ROOT / folder).rglob("*.*")),
    ids=lambda p: str(p.relative_to(ROOT)),
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


def test_isa_objects_export_one_table_each() -> None:
    """A weak symbol compiled with AVX-512 may be merged into baseline code and crash older CPUs."""
    objects = sorted((ROOT / "build").rglob("refine_fast_isa.dir/csrc/isa/*.o"))
    if not objects:
        pytest.skip("no build tree here (a wheel install); .ci/run installs editable and checks it")
    for path in objects:
        table = subprocess.run(
            ["nm", "--defined-only", "--extern-only", path],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        symbols = [line.split()[1:] for line in table.splitlines()]
        level = path.name.removesuffix(".cc.o")
        assert [kind for kind, _ in symbols if kind in "WVu"] == [], (
            f"{path.name} has weak symbols: {symbols}"
        )
        assert [name for _, name in symbols] == [
            f"_ZN11refine_fast{len(level) + 8}{level}_kernelsE"
        ], f"{path.name} exports {symbols}"


def parameters(function: ast.FunctionDef) -> int:
    """How many parameters a function has, self among them."""
    arguments = function.args
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)


def bound(member: object) -> int:
    """How many parameters a function of the extension has, by the signature that pybind11 writes
    into its docstring."""
    signature = member.__doc__.splitlines()[0]
    (function,) = ast.parse(f"def {signature}: ...").body
    return parameters(function)


def test_stub_has_the_extensions_names_and_parameters() -> None:
    from refine_fast import _core

    tree = ast.parse((ROOT / "refine_fast" / "_core.pyi").read_text())
    stub, extension = {}, {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            stub[node.name] = parameters(node)
        elif isinstance(node, ast.ClassDef):
            methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
            stub |= {f"{node.name}.{method.name}": parameters(method) for method in methods}
    for name in dir(_core):
        member = getattr(_core, name)
        if isinstance(member, type):
            own = [key for key in vars(member) if key == "__init__" or not key.startswith("_")]
            extension |= {f"{name}.{key}": bound(getattr(member, key)) for key in own}
        elif not name.startswith("__"):
            extension[name] = bound(member)
    assert stub == extension
    assert stub["info_nce"] == 24


def test_import_is_light() -> None:
    """No heavy package comes along, and what we add to torch's own import stays small."""
    script = f"import sys, refine_fast; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert out.strip() == "[]"
