"""Messages about a configuration that cannot be used."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from .config_values import OptionError, requirement


def option_error(error: ValidationError, model: type[BaseModel]) -> OptionError:
    """The first error in a sentence: field, value, and what the value must be."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    if first["type"] == "missing":
        message = f"no run folder given; add --{name} FOLDER."
    elif first["type"] == "extra_forbidden":
        message = f"unknown option; {similar(name, model.model_fields)}"
    elif first["type"] == "value_error":
        message = f"{_shown(first['input'])} {first['ctx']['error']}."
    else:
        must = requirement(model.model_json_schema()["properties"][name])
        message = f"{_shown(first['input'])} must be {must}."
    return OptionError(f"{name}: {message}", name)


def similar(name: str, known: Iterable[str]) -> str:
    """What to do about an option that is not among the known ones."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "see refine-fast run --help."


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "null" if value is None else str(value) or "''"
