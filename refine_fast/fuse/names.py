"""Matches the tensors of the tuned model to those of the base, which published and re-saved models
name or keep differently."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

OPTIONAL = re.compile(
    r"(^|\.)(embeddings\.(position_ids|token_type_ids)|rotary_emb\.inv_freq)$"
    r"|(^|\.)(pooler|cls|lm_head|classifier|score|qa_outputs|predictions)\."
    r"|^(head|decoder\.bias|vocab_(transform|layer_norm|projector)|(discriminator|generator)_(predictions|lm_head))(\.|$)"
)
"""Tensors that one of two copies of an encoder may lack: buffers that newer transformers no longer
store, the pooler, which retrieval does not use, and heads on top of the encoder."""
# LayerNorm's parameters in checkpoints converted from TensorFlow, such as bert-base-uncased
_TENSORFLOW = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass
class Match:
    """Which tensors belong together. ``pairs``: base name -> tuned name; ``notes``: what was
    reconciled, for the report; ``missing``, ``extra``: names that have no partner."""

    pairs: dict[str, str]
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


def _prefixes(longer: Iterable[str], shorter: set[str]) -> Counter[str]:
    """Each prefix, ending in a dot, that turns names of ``shorter`` into some of ``longer``, and
    how many."""
    found: Counter[str] = Counter()
    for name in longer:
        end = name.find(".") + 1
        while end:
            found[name[:end]] += name[end:] in shorter
            end = name.find(".", end) + 1
    return +found


def _current_names(names: Iterable[str]) -> dict[str, str]:
    """The name that a tensor has today -> its name in the file."""
    current = {name: name for name in names}
    for name in list(current):
        for old, new in _TENSORFLOW.items():
            if name.endswith(old) and (today := name.removesuffix(old) + new) not in current:
                current[today] = current.pop(name)
    return current


def match_names(base: Iterable[str], tuned: Iterable[str]) -> Match:
    """Equal names belong together; what is left is tried with one prefix (``bert.``, ``model.``)
    added or removed throughout."""
    ours, theirs = _current_names(base), _current_names(tuned)
    match = Match({name: name for name in ours.keys() & theirs.keys()})
    left, right = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    needed = [name for name in left if not OPTIONAL.search(name)]
    if needed and right:
        in_tuned, in_base = _prefixes(right, left), _prefixes(left, right)
        candidates = [
            *((count, prefix, "tuned") for prefix, count in in_tuned.items()),
            *((count, prefix, "base") for prefix, count in in_base.items()),
        ]
        if candidates:
            _, prefix, side = max(candidates)
            if side == "tuned":
                renamed = {name: prefix + name for name in left if prefix + name in right}
            else:
                renamed = {prefix + name: name for name in right if prefix + name in left}
            match.notes.append(f"{len(renamed)} names carry the prefix {prefix!r} in {side} only")
            match.pairs |= renamed
            left, right = left - renamed.keys(), right - set(renamed.values())
    for name in sorted(left):
        if OPTIONAL.search(name):
            match.notes.append(f"{ours[name]} is in base only: kept")
        else:
            match.missing.append(ours[name])
    for name in sorted(right):
        if OPTIONAL.search(name):
            match.notes.append(f"{theirs[name]} is in tuned only: left out")
        else:
            match.extra.append(theirs[name])
    changed = [(ours[b] != b, theirs[t] != t) for b, t in match.pairs.items()]
    for side, count in (
        ("base", changed.count((True, False))),
        ("tuned", changed.count((False, True))),
    ):
        if count:
            match.notes.append(
                f"{count} names end in gamma and beta, for weight and bias, in {side} only"
            )
    match.pairs = {ours[b]: theirs[t] for b, t in match.pairs.items()}
    return match


def first_and_count(names: list[str]) -> str:
    """The first name, and how many more there are: "'a' and 3 more"."""
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
