"""From the text of a reply to the queries in it, however the model has put them.

In this order: JSON that follows the schema; any JSON, read with strict=False; JSON after json-repair; numbered, bulleted or plain lines.
Markdown fences, reasoning between <think> tags and prose around the JSON are set aside first.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import json_repair


@dataclass(frozen=True)
class Candidate:
    text: str
    kind: str | None
    """What the reply calls it; None where it says nothing."""


@dataclass(frozen=True)
class Parsed:
    candidates: list[Candidate]
    how: str
    """"schema", "json", "repaired", "lines" or "nothing"."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What was left out on the way: "preamble", "refusal", "cut off" (the reply ended within it)."""


_TEXT_KEYS = ("text", "query", "question", "content", "value")
_KIND_KEYS = ("kind", "type", "category")
_THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"```[a-zA-Z0-9]*\s*\n?(.*?)(?:```|\Z)", re.DOTALL)
_MARKER = re.compile(
    r"^(?:[-*•–—]\s+|[(\[]?\d{1,3}[.):\]](?!\d)\s*|\(?[a-h][.)]\s+|[A-H]\)\s+|(?i:Q|Query|Question)\s*\d*\s*[:.)]\s*|#+\s*)"
)
_PREAMBLE = re.compile(
    r"^(?:here(?:'s| is| are)|sure\b|certainly\b|of course|okay\b|ok[,.!]|below (?:is|are)|the following|i (?:have|can|will|hope)\b(?!'t)|"
    r"let me|note:|hier sind|voici|aquí|claro)|[:：]$",
    re.IGNORECASE,
)
_REFUSAL = re.compile(r"^(?:i'?m (?:sorry|unable)|i am (?:sorry|unable)|sorry\b|i (?:can'?t|can ?not|won'?t)\b|as an ai\b)", re.IGNORECASE)


def no_query(text: str) -> str | None:
    """ "preamble" or "refusal" where the text is one."""
    return "preamble" if _PREAMBLE.search(text) else "refusal" if _REFUSAL.match(text.replace("’", "'")) else None


def parse_queries(text: str, *, cut: bool = False) -> Parsed:
    """``cut``: the reply ended at its length limit, so its last line may be half a query."""
    text = _THINKING.sub("", text).strip()
    for how, value in _readings(text):
        candidates = _collect(value)
        if candidates and how == "repaired" and text.endswith(candidates[-1].text):  # its quote was never closed
            return Parsed(candidates[:-1], how, Counter({"cut off": 1}))
        if candidates or how == "schema":  # under the schema, an empty list is an answer
            return Parsed(candidates, how)
    return _lines(text, cut)


def parse_numbers(text: str) -> list[int] | None:
    """The judge's reply: the numbers under "answerable"; None where there is no such list."""
    for _, value in _readings(_THINKING.sub("", text).strip()):
        numbers = value.get("answerable") if isinstance(value, dict) else value
        if isinstance(numbers, list):
            return [int(n) for n in numbers if isinstance(n, int) or (isinstance(n, str) and n.strip().isdigit())]
    return None


def _readings(text: str) -> list[tuple[str, Any]]:
    """The reply as JSON, each way that yields something, the most faithful first."""
    found = []
    if (value := _load(text, strict=True)) is not None:
        found.append(("schema" if _follows_schema(value) else "json", value))
    bodies = [text, *_FENCE.findall(text), _bracketed(text)]
    found += [("json", value) for body in bodies if body and (value := _load(body, strict=False)) is not None]
    found += [("repaired", value) for body in bodies[1:] if re.match(r"\s*[\[{]", body) and (value := _repair(body))]
    return found


def _repair(text: str) -> Any:
    try:
        return json_repair.loads(text)
    except RecursionError:
        return None


def _load(text: str, *, strict: bool) -> Any:
    try:
        value = json.loads(text, strict=strict)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _bracketed(text: str) -> str:
    """From the first bracket that opens JSON to the last that closes it, or to the end where more are opened than closed."""
    start = re.search(r"[{\[](?=\s*[\"'{\[\]}]|\s*$)", text)
    if start is None:
        return ""
    body = text[start.start() :]
    if any(body.count(opening) > body.count(closing) for opening, closing in ("{}", "[]")):
        return body
    return body[: max(body.rfind("}"), body.rfind("]")) + 1]


def _follows_schema(value: Any) -> bool:
    def is_query(q: Any) -> bool:
        return isinstance(q, dict) and q.keys() == {"kind", "text"} and all(isinstance(v, str) for v in q.values())

    return (
        isinstance(value, dict)
        and value.keys() == {"queries"}
        and isinstance(value["queries"], list)
        and all(map(is_query, value["queries"]))
    )


def _collect(value: Any, kind: str | None = None, depth: int = 0) -> list[Candidate]:
    """Every text in the value: strings of a list, the text of an object, and lists under the name of their kind."""
    if depth > 4:
        return []
    if isinstance(value, str):
        return [Candidate(value.strip(), kind)] if value.strip() else []
    if isinstance(value, list):
        return [candidate for item in value for candidate in _collect(item, kind, depth + 1)]
    if not isinstance(value, dict):
        return []
    kind = next((value[key] for key in _KIND_KEYS if isinstance(value.get(key), str)), kind)
    for key in _TEXT_KEYS:
        if isinstance(value.get(key), str):
            return _collect(value[key], kind, depth + 1)
    return [
        candidate
        for key, item in value.items()
        if key not in _KIND_KEYS and (isinstance(item, list | dict) or re.fullmatch(r"(?:[a-zA-Z]+[ _]?)?\d+", key))
        for candidate in _collect(item, kind if key == "queries" else kind or _singular(key), depth + 1)
    ]


def _singular(key: str) -> str | None:
    """The kind that a list is named after: "questions" -> "question"; none for "1" or "result"."""
    match = re.match(r"(question|keyword|claim|how[-_ ]?to)", key.lower())
    return {"q": "question", "k": "keywords", "c": "claim", "h": "how-to"}[match[1][0]] if match else None


def _lines(text: str, cut: bool) -> Parsed:
    """Marked lines where there are any, otherwise every line. Rests of JSON are no lines."""
    rows = [row.strip() for row in text.splitlines() if re.search(r"[^\s`{}\[\]\",]", row)]
    rows = [row for row in rows if not re.match(r"^[\"']?\w+[\"']?\s*:\s*[\[{\"]|^[{\[](?!\d)", row)]
    marked = any(_MARKER.match(row) for row in rows)
    dropped: Counter[str] = Counter()
    candidates = []
    for row in rows:
        cleaned = _clean(row)
        if reason := no_query(cleaned):
            dropped[reason] += 1
        elif cleaned and (_MARKER.match(row) or not marked):
            candidates.append(Candidate(cleaned, None))
    if cut and candidates:
        candidates.pop()
        dropped["cut off"] += 1
    return Parsed(candidates, "lines" if candidates else "nothing", dropped)


def _clean(row: str) -> str:
    previous = None
    while row != previous:  # "1. **Q1: text**" has three layers
        previous = row
        row = _MARKER.sub("", row).strip()
        row = re.sub(r"^(\*\*|__|\*|`)(.+?)\1$", r"\2", row).strip()
        row = re.sub(r'^["\'“‘«](.+?)["\'”’»],?$', r"\1", row).strip()
    return row
