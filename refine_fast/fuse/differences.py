"""What differs between two models around their tensors, in words."""

from __future__ import annotations

from dataclasses import dataclass, field

_SHOWN = 60


@dataclass
class Differences:
    """``refused``: the tuned tensors mean something else in base; ``harmless``: they do not. Each
    is a clause that names the file, the field and both values."""

    refused: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)

    def __iadd__(self, other: Differences) -> Differences:
        self.refused += other.refused
        self.harmless += other.harmless
        return self


def shown(value: object) -> str:
    """A value from a file, for a message: one line, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def shown_name(name: str) -> str:
    """A name from a file, for a message."""
    return name[:_SHOWN] if name.isprintable() else shown(name)


def differ(file: str, name: str, base: object, tuned: object) -> str:
    """The clause for one field."""
    return f"{file}: {shown_name(name)} is {shown(base)} in base and {shown(tuned)} in tuned"
