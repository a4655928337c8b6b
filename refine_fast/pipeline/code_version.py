"""The version of a module's code: all of refine_fast that it imports, and the versions of the other
packages that it imports.

Docstrings, comments, formatting and imports under ``if TYPE_CHECKING`` do not count. Every other
import counts, wherever it is in a file: dependencies are found, not declared, so none is forgotten.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True)
class CodeVersion:
    """What the output of a module depends on besides its input."""

    modules: dict[str, str] = field(default_factory=dict)
    """Module of refine_fast -> SHA-256 of its code, and of the data files beside it."""
    packages: dict[str, str] = field(default_factory=dict)
    """Distribution -> version; "python" among them."""


@cache
def code_version(module: str) -> CodeVersion:
    """The import closure of ``module``, such as "refine_fast.pipeline.stages.mine"."""
    modules: dict[str, str] = {}
    external: set[str] = set()
    remaining = [module]
    while remaining:
        name = remaining.pop()
        if name in modules:
            continue
        modules[name], imported = _inspect(name)
        remaining += [other for other in imported if other.partition(".")[0] == PACKAGE]
        external |= {other.partition(".")[0] for other in imported} - {PACKAGE}
    distributions = _distributions()
    packages = {
        distribution: _version(distribution)
        for name in external - sys.stdlib_module_names
        for distribution in distributions.get(name, ())
    }
    packages["python"] = ".".join(map(str, sys.version_info[:2]))
    return CodeVersion(dict(sorted(modules.items())), dict(sorted(packages.items())))


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


@cache
def _version(distribution: str) -> str:
    return version(distribution)


@cache
def _inspect(name: str) -> tuple[str, frozenset[str]]:
    """The digest of one module, and the modules that it imports."""
    path = _path(name)
    assert path is not None, name
    if path.suffix != ".py":  # a compiled extension
        return hashlib.sha256(path.read_bytes()).hexdigest(), frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imported = frozenset(_imports(tree, package))
    digest = hashlib.sha256(ast.unparse(_WithoutDocstrings().visit(tree)).encode())
    for file in _data_files(path.parent):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest(), imported


@cache
def _path(name: str) -> Path | None:
    """The file of a module; None if there is no such module. Imports nothing but the package."""
    package, _, inner = name.partition(".")
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    base = Path(spec.origin).parent.joinpath(*inner.split("."))
    for path in (base / "__init__.py", base.with_name(f"{base.name}.py")):
        if path.is_file():
            return path
    if not inner or "." in inner:
        return None
    spec = find_spec(name)  # a compiled extension may be installed elsewhere
    return Path(spec.origin) if spec is not None and spec.origin else None


@cache
def _data_files(folder: Path) -> tuple[Path, ...]:
    """Templates and the like: in the folder, and in its subfolders that are not packages."""
    code = {".py", ".pyi", ".pyc", ".so", ".pyd"}
    files: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != "__pycache__" and not (path / "__init__.py").exists():
            files += _data_files(path)
        elif path.is_file() and path.suffix not in code and path.name != "py.typed":
            files.append(path)
    return tuple(files)


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of the modules that run when this code does."""
    remaining = [tree]
    while remaining:
        node = remaining.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            remaining += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                inside = module.partition(".")[0] == PACKAGE
                yield submodule if inside and _path(submodule) else module
        elif (
            isinstance(node, ast.Call)
            and node.args
            and isinstance(name := getattr(node.args[0], "value", None), str)
            and ast.unparse(node.func).endswith("import_module")
            and _path(name)
        ):
            yield name
        remaining += ast.iter_child_nodes(node)


class _WithoutDocstrings(ast.NodeTransformer):
    """Removes every string that is a statement of its own: docstrings of any kind."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        # no statement is within an expression
        return node if isinstance(node, ast.expr) else super().generic_visit(node)
