"""Which folder of a checkpoint holds which part of a loaded model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..errors import RefineFastError
from .checkpoint import parse_json
from .plan import modules_of

ROUTER_CONFIG = "router_config.json"
"""In the folder of a sentence-transformers router: the routes' modules, each a folder."""


def folder_of_prefix(model: nn.Module, root: Path) -> dict[str, str]:
    """Maps each prefix of parameter names to the folder, relative to ``root``, that holds them.

    A SentenceTransformer is a sequence of modules with one folder each; a router among them has
    one folder for each module of each route. Any other model has one folder.

    Raises:
        RefineFastError: if the description of a router cannot be read.
    """
    folders = modules_of(root)
    if not isinstance(model, nn.Sequential) or not (root / "modules.json").is_file():
        return {"": folders[0]}
    found: dict[str, str] = {}
    for (name, _), folder in zip(model.named_children(), folders, strict=False):
        description = root / folder / ROUTER_CONFIG
        if not description.is_file():
            found[f"{name}."] = folder
            continue
        try:
            routes = parse_json(description.read_bytes())["structure"]
            for route, parts in routes.items():
                for i, part in enumerate(parts):
                    found[f"{name}.sub_modules.{route}.{i}."] = str(Path(folder, part))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RefineFastError(f"{description} is malformed: {error}") from error
    return found
