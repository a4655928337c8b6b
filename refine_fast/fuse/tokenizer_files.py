"""Compares the tokenizers of two models by their files: a row of the embedding matrix must stand
for the same token in both.

Read are tokenizer.json, and the vocab.txt (WordPiece), or vocab.json and merges.txt (BPE), that
older models have instead. Models of SentencePiece are compared only where both have tokenizer.json:
transformers numbers their pieces in its own ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .differences import Differences, differ, shown
from .model_files import UnreadableFileError, read_bytes, read_json, read_text

_UNREAD = ("*.model", "*.vocab", "*.tiktoken", "vocab.*", "bpe*")
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_SETTINGS = (
    *_ROLES,
    *("add_bos_token", "add_eos_token", "add_prefix_space", "padding_side"),
    *("strip_accents", "tokenize_chinese_chars"),
)
"""Fields of tokenizer_config.json that are reported: transformers adds them when it saves a
tokenizer, and people set them."""
_STEPS = ("normalizer", "pre_tokenizer", "post_processor")
"""Parts of tokenizer.json that are reported: transformers 5 builds its own for many classes, and
saves them in place of those that it read."""
_SCORE = 1e-3  # of a Unigram piece: more than rounding to float32


@dataclass
class Tokenizer:
    """A tokenizer as its files describe it: ``algorithm`` ("WordPiece", "BPE", "Unigram", ...);
    ``ids`` of all tokens; ``special``: those that ordinary text does not contain; ``merges`` of
    BPE and ``scores`` of Unigram; ``lowercase``: None where the files leave it to the version of
    transformers; ``steps``: the rest of tokenizer.json; ``settings``: of tokenizer_config.json."""

    file: str
    algorithm: str
    ids: dict[str, int]
    special: set[str] = field(default_factory=set)
    merges: list[Any] | None = None
    scores: dict[str, float] = field(default_factory=dict)
    lowercase: bool | None = None
    steps: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def compare_tokenizers(base: Path, tuned: Path, prefix: str = "") -> Differences:
    """Compares the tokenizers in two folders; equal files are not parsed.

    Args:
        base, tuned: folders that may hold a tokenizer.
        prefix: of file names in messages.

    Raises:
        UnreadableFileError: a file that cannot be read.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt",
             "added_tokens.json")  # fmt: skip
    if all(read_bytes(base / name) == read_bytes(tuned / name) for name in names):
        return Differences()
    ours, theirs = _read(base), _read(tuned)
    if ours is None or theirs is None:
        return _not_compared(base, tuned, ours, theirs, prefix)
    if ours.file != theirs.file and ours.algorithm != theirs.algorithm:
        # a class of its own may use a file of an old name in its own way
        return Differences(
            harmless=[
                f"{prefix}{ours.file} in base and {prefix}{theirs.file} in tuned were not compared"
            ]
        )
    return _compare(ours, theirs, prefix)


def _not_compared(
    base: Path, tuned: Path, ours: Tokenizer | None, theirs: Tokenizer | None, prefix: str
) -> Differences:
    if ours is None and theirs is None:
        return Differences()
    readable, other = (tuned, base) if ours is None else (base, tuned)
    unread = sorted(path.name for pattern in _UNREAD for path in other.glob(pattern))
    file = (ours or theirs).file  # type: ignore[union-attr]
    side, opposite = ("tuned", "base") if readable is tuned else ("base", "tuned")
    if unread:
        return Differences(
            harmless=[
                f"{prefix}{file} in {side} and {prefix}{unread[0]} in {opposite} were not compared"
            ]
        )
    if side == "tuned":
        return Differences(harmless=[f"{prefix}{file}: only tuned has a tokenizer"])
    return Differences()


def _read(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, if it has one in a form that is read."""
    settings = read_json(folder / "tokenizer_config.json") or {}
    if (folder / "tokenizer.json").is_file():
        tokenizer = _read_tokenizers(folder / "tokenizer.json")
    elif (text := read_text(folder / "vocab.txt")) is not None:
        ids = {token: i for i, token in enumerate(_lines(text))}
        tokenizer = Tokenizer("vocab.txt", "WordPiece", ids)
    elif ids := _ids(read_json(folder / "vocab.json")):
        lines = _lines(read_text(folder / "merges.txt") or "")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        tokenizer = Tokenizer("vocab.json", "BPE", ids, merges=merges or None)
    else:
        return None
    for token, number in _ids(read_json(folder / "added_tokens.json")).items():
        tokenizer.ids.setdefault(token, number)
    with _malformed(folder / "tokenizer_config.json"):
        _add_settings(tokenizer, settings)
    return tokenizer


@contextmanager
def _malformed(path: Path) -> Iterator[None]:
    """What a value of an unexpected type raises becomes an UnreadableFileError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UnreadableFileError(f"{path} is malformed: {shown(error)}") from error


def _add_settings(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    added = settings.get("added_tokens_decoder")
    for number, token in (added if isinstance(added, dict) else {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdigit():
            tokenizer.ids.setdefault(token["content"], int(number))
            if token.get("special"):
                tokenizer.special.add(token["content"])
    tokenizer.settings = {
        name: value.get("content") if isinstance(value, dict) else value
        for name in _SETTINGS
        if (value := settings.get(name)) is not None
    }
    tokenizer.special |= {tokenizer.settings[role] for role in _ROLES if role in tokenizer.settings}
    if isinstance(lower := settings.get("do_lower_case"), bool):
        tokenizer.lowercase = lower  # transformers gives it precedence over tokenizer.json


def _lines(text: str) -> list[str]:
    """Not splitlines(): a token may be a separator of Unicode."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def _ids(vocabulary: Any) -> dict[str, int]:
    entries = vocabulary.items() if isinstance(vocabulary, dict) else ()
    return {token: number for token, number in entries if isinstance(number, int)}


def _read_tokenizers(path: Path) -> Tokenizer:
    """A tokenizer.json, as the library tokenizers writes it."""
    content = read_json(path) or {}
    with _malformed(path):
        return _parse(path.name, content)


def _parse(file: str, content: dict[str, Any]) -> Tokenizer:
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    vocabulary = model.get("vocab")
    tokenizer = Tokenizer(file, str(model.get("type") or "BPE"), _ids(vocabulary))
    if isinstance(vocabulary, list):  # Unigram: pairs of a piece and its score
        pairs = [pair for pair in vocabulary if isinstance(pair, list) and len(pair) == 2]
        tokenizer.algorithm = "Unigram"
        tokenizer.ids = {piece: i for i, (piece, _) in enumerate(pairs)}
        tokenizer.scores = {piece: float(score) for piece, score in pairs}
    elif model.get("type") is None:
        tokenizer.algorithm = "BPE" if "merges" in model else "WordPiece"
    if isinstance(merges := model.get("merges"), list):
        # "a b" before tokenizers 0.20
        tokenizer.merges = [m.split(" ") if isinstance(m, str) else [*m] for m in merges]
    for token in content.get("added_tokens") or []:
        tokenizer.ids[token["content"]] = int(token["id"])
        if token.get("special"):
            tokenizer.special.add(token["content"])
    if not all(isinstance(token, str) for token in tokenizer.ids):
        raise TypeError("a token is not a string")
    tokenizer.steps = {name: content.get(name) for name in _STEPS}
    return tokenizer


def _compare(ours: Tokenizer, theirs: Tokenizer, prefix: str) -> Differences:
    found = Differences()
    file = prefix + (
        ours.file if ours.file == theirs.file else f"{ours.file} and {prefix}{theirs.file}"
    )
    if ours.algorithm != theirs.algorithm:
        found.refused.append(differ(file, "model.type", ours.algorithm, theirs.algorithm))
        return found
    moved = [token for token, i in ours.ids.items() if theirs.ids.get(token, i) != i]
    if moved:
        first = min(moved, key=lambda token: (ours.ids[token], token))
        found.refused.append(
            f"{file}: the id of {shown(first)} is {ours.ids[first]} in base and"
            f" {theirs.ids[first]} in tuned, and so on for {len(moved)} tokens"
        )
    special = ours.special | theirs.special
    for side, one, other in (("base", ours, theirs), ("tuned", theirs, ours)):
        alone = sorted(one.ids.keys() - other.ids.keys(), key=lambda token: (one.ids[token], token))
        for kind, names, where in (
            ("token", [t for t in alone if t not in special], found.refused),
            ("special token", [t for t in alone if t in special], found.harmless),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                first = f"{shown(names[0])} with id {one.ids[names[0]]}"
                where.append(f"{file}: only {side} has the {kind} {first}{more}")
    if ours.merges is not None and theirs.merges is not None and ours.merges != theirs.merges:
        pairs = zip([*ours.merges, None], [*theirs.merges, None], strict=False)
        i, (a, b) = next((i, (a, b)) for i, (a, b) in enumerate(pairs) if a != b)
        found.refused.append(differ(file, f"merge {i}", a, b))
    rescored = [
        piece
        for piece, score in ours.scores.items()
        if piece not in special and abs(theirs.scores.get(piece, score) - score) > _SCORE
    ]
    if rescored:
        piece = rescored[0]
        found.refused.append(
            differ(file, f"the score of {shown(piece)}", ours.scores[piece], theirs.scores[piece])
        )
    if ours.lowercase is not None and theirs.lowercase not in (None, ours.lowercase):
        found.refused.append(
            differ(f"{prefix}tokenizer_config.json", "do_lower_case", ours.lowercase,
                   theirs.lowercase)
        )  # fmt: skip
    for name in _STEPS:
        a, b = ours.steps.get(name), theirs.steps.get(name)
        if a != b and ours.steps and theirs.steps:
            found.harmless.append(differ(file, name, a, b))
    for name in _SETTINGS:
        a, b = ours.settings.get(name), theirs.settings.get(name)
        if a is not None and b is not None and a != b:
            found.harmless.append(differ(f"{prefix}tokenizer_config.json", name, a, b))
    return found
