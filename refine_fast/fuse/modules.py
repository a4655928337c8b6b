"""Which folder of a checkpoint holds which part of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from ..errors import RefineFastError
from .model_files import parse_json

MODULES = "modules.json"
"""In the root of a sentence-transformers model: its modules, in order."""
ROUTER_CONFIG = "router_config.json"
"""In the folder of a sentence-transformers router: the routes' modules, each a folder."""
WITHOUT_WEIGHTS = ("Normalize", "Dropout")
"""Modules that one of two models of the same architecture may lack: cosine similarity normalizes
too, and dropout does nothing outside of training."""
_RENAMED = {"Asym": "Router"}  # sentence-transformers 5


@dataclass(frozen=True, slots=True)
class Module:
    """One module of a sentence-transformers model: the name of its class, without the package,
    which differs between versions; its folder, relative to the root; the route of a router that it
    belongs to."""

    kind: str
    folder: str
    route: str = ""


def modules_of(root: Path) -> list[Module]:
    """The modules of a sentence-transformers model in their order; none for a plain folder.

    Raises:
        RefineFastError: if modules.json cannot be read or names a folder outside the model.
    """
    path = root / MODULES
    if not path.is_file():
        return []
    try:
        described = parse_json(path.read_bytes())
        return [
            Module(_kind(module.get("type", "")), _inside(root, module["path"]))
            for module in described
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefineFastError(f"{path} is malformed: {error}") from error


def folders_of(root: Path) -> list[str]:
    """The folders of the modules, relative to the root; the root alone for a plain folder.

    Raises:
        RefineFastError: as ``modules_of``.
    """
    return [module.folder for module in modules_of(root)] or ["."]


def modules_and_routes_of(root: Path) -> list[Module]:
    """As ``modules_of``, with the modules of each route after their router.

    Raises:
        RefineFastError: if the description of the modules or of a router cannot be read.
    """
    found = []
    for module in modules_of(root):
        found.append(module)
        if (root / module.folder / ROUTER_CONFIG).is_file():
            found += [part for parts in _routes_of(root, module.folder).values() for part in parts]
    return found


def pair_modules(
    base: list[Module], tuned: list[Module]
) -> tuple[list[tuple[Module, Module]], bool]:
    """The modules of two models that correspond, in order, and whether the two lists agree but for
    ``WITHOUT_WEIGHTS``. Lists that do not agree are paired by position."""
    needed = [[m for m in modules if m.kind not in WITHOUT_WEIGHTS] for modules in (base, tuned)]
    kinds = [[(m.kind, m.route) for m in modules] for modules in needed]
    if kinds[0] == kinds[1]:
        return list(zip(*needed, strict=True)), True
    return list(zip(base, tuned, strict=False)), False


def folder_of_prefix(model: nn.Module, root: Path) -> dict[str, str]:
    """Maps each prefix of parameter names to the folder, relative to ``root``, that holds them.

    A SentenceTransformer is a sequence of modules with one folder each; a router among them has
    one folder for each module of each route. Any other model has one folder.

    Raises:
        RefineFastError: if the description of a router cannot be read.
    """
    modules = modules_of(root)
    if not isinstance(model, nn.Sequential) or not modules:
        return {"": modules[0].folder if modules else "."}
    found: dict[str, str] = {}
    for (name, _), module in zip(model.named_children(), modules, strict=False):
        if not (root / module.folder / ROUTER_CONFIG).is_file():
            found[f"{name}."] = module.folder
            continue
        for route, parts in _routes_of(root, module.folder).items():
            for i, part in enumerate(parts):
                found[f"{name}.sub_modules.{route}.{i}."] = part.folder
    return found


def _routes_of(root: Path, folder: str) -> dict[str, list[Module]]:
    """The modules of each route of the router in a folder."""
    path = root / folder / ROUTER_CONFIG
    try:
        content: Any = parse_json(path.read_bytes())
        types = content.get("types") or {}
        return {
            route: [
                Module(
                    _kind(types.get(part, "")), _inside(root, str(Path(folder, part))), str(route)
                )
                for part in parts
            ]
            for route, parts in content["structure"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefineFastError(f"{path} is malformed: {error}") from error


def _kind(name: str) -> str:
    kind = name.rpartition(".")[2]
    # the text encoder's class has been renamed, and models with code of their own derive from it
    return "Transformer" if kind.endswith("Transformer") else _RENAMED.get(kind, kind)


def _inside(root: Path, folder: str) -> str:
    """The folder, as ``Checkpoint.components`` names it."""
    path = PurePosixPath(folder)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{folder!r} is outside {root}")
    return str(path)
