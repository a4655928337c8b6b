"""Whether the tensors of two models mean the same: compares everything around them that decides
how they are used."""

from __future__ import annotations

from pathlib import Path

from .config_files import compare_configs
from .differences import Differences
from .model_files import UnreadableFileError, read_json
from .modules import MODULES, Module, modules_and_routes_of, pair_modules
from .tokenizer_files import compare_tokenizers

_SETTINGS = "config_sentence_transformers.json"


def compare_models(base: Path, tuned: Path) -> Differences:
    """Compares two model folders module by module: the list of modules, each one's JSON files, and
    each one's tokenizer. What only one folder has is reported, not refused, as far as it matters:
    the output has base's files.

    Args:
        base: a model folder.
        tuned: likewise, or the folder of an adapter, which has some of these files or none.

    Raises:
        RefineFastError: if the description of the modules cannot be read; other files that cannot
            are reported.
    """
    found = Differences()
    ours, theirs = modules_and_routes_of(base), modules_and_routes_of(tuned)
    pairs, same = pair_modules(ours, theirs)
    if ours and theirs and _kinds(ours) != _kinds(theirs):
        lists = f"{_kinds(ours)} in base and {_kinds(theirs)} in tuned"
        (found.harmless if same else found.refused).append(f"{MODULES}: the modules are {lists}")
    elif theirs and not ours:
        found.harmless.append(f"{MODULES}: only tuned has one")
    if not pairs:
        plain = [Module("", ".")]
        pairs = [((ours or plain)[0], (theirs or plain)[0])]
    for a, b in pairs:
        if a.kind == b.kind or not (a.kind and b.kind):
            _compare_modules(base / a.folder, tuned / b.folder, a.folder, found)
    _compare_configs(base, tuned, "", _SETTINGS, found)
    return found


def _kinds(modules: list[Module]) -> str:
    return ", ".join(f"{module.route} {module.kind}".strip() for module in modules)


def _compare_modules(base: Path, tuned: Path, folder: str, found: Differences) -> None:
    prefix = "" if folder == "." else f"{folder}/"
    names = {"config.json", *(path.name for path in base.glob("sentence_*_config.json"))}
    for name in sorted(names):
        _compare_configs(base, tuned, prefix, name, found)
    try:
        found += compare_tokenizers(base, tuned, prefix)
    except UnreadableFileError as error:
        found.harmless.append(f"the tokenizers were not compared: {error}")


def _compare_configs(base: Path, tuned: Path, prefix: str, name: str, found: Differences) -> None:
    try:
        ours, theirs = (read_json(folder / name) for folder in (base, tuned))
    except UnreadableFileError as error:
        found.harmless.append(f"{prefix}{name} was not compared: {error}")
        return
    if name == _SETTINGS:
        found += compare_configs(name, ours or {}, theirs or {}, harmless=True)
    elif ours is not None and theirs is not None:
        found += compare_configs(prefix + name, ours, theirs)
