"""A configuration from a YAML file and flags."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import RefineFastError
from .config import GIVEN, RunConfig
from .config_messages import similar
from .config_values import LLM_TEACHER, OptionError, is_windows_path
from .corpus.nanobeir import is_nanobeir
from .encoder.load import DEFAULT_ENCODER
from .engine import RunFolder, Stage, not_of_a_run
from .recipes import DEMO, RECIPES

_PATHS = ("docs", "queries", "out", "prompt", "judge_prompt")
"""Fields that a YAML file gives relative to itself; so do ``model`` and ``teacher``, where they are
folders, and ``ood``."""


def load_config(
    path: Path | None, flags: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> RunConfig:
    """The configuration in a YAML file, overridden by flags.

    Args:
        path: the YAML file. None: the config.yaml of the run folder ``flags["out"]`` if it exists
            and no documents are given, so that the run is resumed; else the defaults. Where
            neither the file nor a flag gives documents, they are those of that run.
        flags: field -> value, as text or typed.
        defaults: field -> its value where neither ``path`` nor a flag gives one; of a run that is
            resumed they replace what it began with.

    Returns:
        The configuration; its ``model_fields_set`` has the names of what was asked for, now or when
        a run that is resumed was begun. The rest of a saved configuration is kept too, except what
        a flag fills in anew: by another recipe, another fusion, or a number of epochs.

    Raises:
        RefineFastError: if the file or a value cannot be used.
    """
    file, named = ({}, None) if path is None else _read_yaml(path)
    asked = {*(file if named is None else named), *flags}
    filled_in = {**_still_filled_in(file, asked, flags), **(defaults or {})}
    given = {**{name: value for name, value in file.items() if name in asked}, **flags}
    saved = Path(flags.get("out", "")).expanduser() / "config.yaml"
    earlier: set[str] = set()
    if "out" in flags and "docs" not in {**file, **flags} and saved.is_file():
        before, named = _read_yaml(saved)
        if not before:
            raise RefineFastError(f"config: {saved} is empty; give DOCS and the options again.")
        if path is not None:
            before, named = {"docs": before.get("docs")}, {"docs"}
        named = (named or set()) - filled_in.keys()
        filled_in = {**_still_filled_in(before, named, flags), **filled_in}
        earlier = named - given.keys()
        asked |= named
    if "epochs" in given and "max_steps" not in asked:
        filled_in.pop("max_steps", None)
    try:
        config = RunConfig(**{**filled_in, **given})
    except OptionError as error:
        named = (earlier - {"docs"}).intersection(error.options)
        if not named:
            raise
        raise RefineFastError(
            f"{error} An earlier start was given {', '.join(sorted(named))}: give it anew, or "
            f"delete its line in {saved}."
        ) from None
    config.model_fields_set.intersection_update(asked)
    return config


def _still_filled_in(
    values: Mapping[str, Any], asked: Collection[str], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of a file that names all, without those that were filled in for another than a
    flag gives now. ``asked``: names of those that were asked for."""
    gone: set[str] = set()
    if "recipe" in flags and flags["recipe"] != values.get("recipe"):
        gone |= RECIPES["paper"].keys()
    if flags.get("docs") is not None and values.get("docs") is None:
        gone |= DEMO.keys()
    if "fusion" in flags:
        gone.add("weight")  # it belongs to the fusion
    return {name: value for name, value in values.items() if name in asked or name not in gone}


def refuse_others(folder: RunFolder, stages: Collection[Stage]) -> None:
    """Raises RefineFastError if something in a run folder that is not of a run would be replaced:
    by an output of a stage, or by config.yaml where a run begins."""
    folder.refuse_others(stages)
    path = folder.path / "config.yaml"
    if not folder.begun and path.is_file():
        try:
            _read_yaml(path)
        except RefineFastError:
            raise not_of_a_run(path) from None


def saved_config(run: Path) -> RunConfig:
    """The configuration of a run, for a command that only reads its folder. The run may have moved,
    and inputs that are gone by now, or the file itself, are left out.

    Raises:
        RefineFastError: if its config.yaml cannot be used.
    """
    path = run / "config.yaml"
    values = {**(_read_yaml(path)[0] if path.is_file() else {}), "out": run}
    for name in ("docs", "queries", "prompt", "judge_prompt"):
        if values.get(name) is not None and not Path(values[name]).exists():
            values[name] = None
    return RunConfig(**{**values, "ood": "none"})


def _read_yaml(path: Path) -> tuple[dict[str, Any], set[str] | None]:
    """The values in a file, and the names of those that were asked for if it says so, as the
    config.yaml of a run does; None: it does not say."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except FileNotFoundError:
        raise RefineFastError(
            f"config: {path} does not exist; give the path of a YAML file."
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # 2024-02-30 is a ValueError
        reason = " ".join(str(error).split())
        remedy = "put paths with \\ in single quotes" if "escape" in reason else "correct it"
        raise RefineFastError(
            f"config: {path} cannot be read as YAML ({reason}); {remedy}."
        ) from None
    if not isinstance(values, dict):
        raise RefineFastError(f"config: {path} has no keys; write lines such as 'skip: 5'.")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    given = values.pop(GIVEN, None)
    if not isinstance(given, list | None):
        raise RefineFastError(
            f"config: {path} has {GIVEN}: {given}; write a list of names, or remove the line."
        )
    for name in values.keys() - RunConfig.model_fields.keys():
        remedy = similar(name, RunConfig.model_fields)
        raise RefineFastError(f"config: {path} has an unknown key {name!r}; {remedy}")

    def beside(value: Any) -> Any:
        text = str(value).strip()
        if not isinstance(value, str) or not text or is_windows_path(text):
            return value
        return os.path.join(path.parent, os.path.expanduser(text))

    values |= {name: beside(values[name]) for name in _PATHS if name in values}
    for name, own in (("model", DEFAULT_ENCODER), ("teacher", LLM_TEACHER)):
        model = values.get(name)
        if model != own and isinstance(model, str) and os.path.isdir(beside(model)):
            values[name] = beside(model)
    if values.get("ood") not in (None, "none"):
        folders = values["ood"] if isinstance(values["ood"], list) else [values["ood"]]
        values["ood"] = [
            folder if is_nanobeir(str(folder), path.parent) else beside(folder)
            for folder in folders
        ]
    return values, None if given is None else values.keys() & map(str, given)
