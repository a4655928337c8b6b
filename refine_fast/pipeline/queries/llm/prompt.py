"""From a template to the messages of a request.

A template is a jinja2 file with the blocks ``system`` and ``user``. One with the blocks ``example``
and ``reply`` too, which small models need, asks for plain lines; any other, for JSON.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from ....errors import RefineFastError

KINDS = {
    "question": (
        "a question as somebody would ask it who has the problem and has not read the passage"
    ),
    "keywords": "two to six words, as typed into a search box",
    "claim": "a statement to be checked, in words of its own",
    "how-to": "a request for instructions, such as 'how to ...'",
}
"""Kind of query -> what the prompt says about it."""


def default_prompt(name: str = "queries") -> str:
    """The bundled template: "queries", "lines" (queries by small models), or "judge"."""
    return (resources.files(__package__) / "prompts" / f"{name}.jinja").read_text(encoding="utf-8")


class Template:
    """A user's template, or the bundled one under ``name``.

    Raises:
        RefineFastError: if the file cannot be read or is not such a template.
    """

    def __init__(self, path: Path | None = None, *, name: str = "queries") -> None:
        self._path = path
        environment = SandboxedEnvironment(
            undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        try:
            self._template = environment.from_string(
                default_prompt(name) if path is None else path.read_text(encoding="utf-8")
            )
        except (OSError, UnicodeDecodeError) as error:
            raise RefineFastError(
                f"prompt: {path} cannot be read ({error}); give a UTF-8 text file."
            ) from None
        except jinja2.TemplateSyntaxError as error:
            raise RefineFastError(
                f"prompt: {path}, line {error.lineno}: {error.message}; correct the template."
            ) from None
        if "user" not in self._template.blocks:
            raise RefineFastError(
                f"prompt: {path} has no block 'user'; start from the output of "
                f"'refine-fast prompt {name}'."
            )

    @property
    def asks_for_lines(self) -> bool:
        """Whether replies are plain lines, as the worked example shows."""
        return {"example", "reply"} <= self._template.blocks.keys()

    def shot(self, **variables: Any) -> tuple[str, str]:
        """The worked example: what is asked, and the reply."""
        return self._block("example", variables), self._block("reply", variables)

    def render(self, **variables: Any) -> tuple[str, str]:
        """The system message (may be empty) and the user message.

        Raises:
            RefineFastError: if the template uses an unknown variable or fails otherwise.
        """
        return self._block("system", variables), self._block("user", variables)

    def _block(self, name: str, variables: dict[str, Any]) -> str:
        if name not in self._template.blocks:
            return ""
        try:
            return "".join(
                self._template.blocks[name](self._template.new_context(variables))
            ).strip()
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            names = ", ".join(sorted(variables))
            raise RefineFastError(
                f"prompt: {self._path}, block {name}: {error}; the variables are {names}."
            ) from None


def wanted(mix: Mapping[str, float], count: int, draw: str) -> list[dict[str, Any]]:
    """How many queries of which kind: ``count`` kinds drawn from the mix, seeded with ``draw``.

    Returns:
        One {"kind", "count", "meaning"} for each kind that was drawn, in the order of the mix.
    """
    drawn = Counter(random.Random(draw).choices(list(mix), weights=list(mix.values()), k=count))
    return [
        {"kind": kind, "count": drawn[kind], "meaning": KINDS.get(kind, kind)}
        for kind in mix
        if drawn[kind]
    ]


def query_schema(kinds: list[str]) -> dict[str, Any]:
    """JSON schema of a reply with queries, within the subset that strict servers accept."""
    query = {
        "type": "object",
        "properties": {"kind": {"type": "string", "enum": kinds}, "text": {"type": "string"}},
        "required": ["kind", "text"],
        "additionalProperties": False,
    }
    return _object(queries={"type": "array", "items": query})


def judge_schema() -> dict[str, Any]:
    """JSON schema of the judge's reply."""
    return _object(answerable={"type": "array", "items": {"type": "integer"}})


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
