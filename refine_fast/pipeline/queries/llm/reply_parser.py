"""From the text of a reply to the queries in it, in whatever form the model wrote them.

Read in this order: JSON that follows the schema; any JSON, with strict=False; JSON after
json-repair; numbered, bulleted or plain lines. Markdown fences, reasoning, marks of chat templates
and prose around the JSON are removed first.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from textwrap import dedent
from typing import Any

import json_repair

from ...corpus.text import whole_characters


@dataclass(frozen=True)
class Candidate:
    """A text that may be a query."""

    text: str
    kind: str | None
    """The kind that the reply names; None where it names none."""


@dataclass(frozen=True)
class Parsed:
    """The candidates of one reply."""

    candidates: list[Candidate]
    how: str
    """"schema", "json", "repaired", "lines" or "nothing"."""
    dropped: Counter[str] = field(default_factory=Counter)
    """What was left out: "preamble", "refusal", "cut off" (the reply ended within it), "beside the
    list" (prose between or under the marked lines: explanations, answers), "reasoning" (a whole
    reply)."""


_TEXT_KEYS = ("text", "query", "question", "content", "value")

_KIND_KEYS = ("kind", "type", "category")

_REASONING_NAME = (
    r"(?:\w+[:_])?(?:think\w*|thoughts?|thought_process|chain_of_thought|cot|reasoning|rationale|"
    r"reflection|analysis|scratchpad|monologue)"
)

_LT, _GT = "(?:<|&lt;)", "(?:>|&gt;)"

_OPENING_TAG = rf"{_LT}\|?\s*{_REASONING_NAME}(?:\s[^<>]*?)?\|?{_GT}"

_CLOSING_TAG = rf"{_LT}\|?\s*/\s*{_REASONING_NAME}\s*\|?{_GT}"

_DETAILS = (  # as a web server folds what it got from the model
    rf"{_LT}details\b(?:[^<>]*?\btype=\W*reasoning|[^<>]*?{_GT}\s*{_LT}summary{_GT}[^<>\n]*?"
    rf"\b(?:think|thought|reason)).*?(?:{_LT}/details{_GT}|\Z)[ \t]*"
)

_OPENING_MARK = (
    r"\[THINK\]|◁think▷|<\|(?:begin|start)_(?:of_)?th(?:ought|ink(?:ing)?)\|>|<\|channel>thought\b|"
    r"<\|channel\|>(?:analysis|commentary)\b"
)

_CLOSING_MARK = (
    r"\[/THINK\]|◁/think▷|<\|end_(?:of_)?th(?:ought|ink(?:ing)?)\|>|<channel\|>|"
    r"<\|channel\|>final<\|message\|>|assistantfinal|"
    r"\[BEGIN FINAL RESPONSE\]|^here is my response:"  # Apriel's, and Granite's
)

_REASONED = rf".*?(?:{_CLOSING_TAG}|{_CLOSING_MARK}|\Z)[ \t]*"

_SENTENCE_END = r"(?<=[.!?…:。！？：])"

_LINE_START = r"^(?:[^\S\n]|[>*\ufeff\u200b])*"

_TURN = r"<\|[^|>]{1,40}\|>(?:assistant\b)?"

_ANYWHERE = re.DOTALL | re.IGNORECASE | re.MULTILINE

# Closed, or never closed. A tag opens it at the beginning of a line, between sentences, after a
# mark of the template, or where other reasoning ends: queries may be about "<think>".
_REASONING = re.compile(
    rf"(?:(?:{_LINE_START}|{_SENTENCE_END}[ \t]+|{_TURN}[ \t]*){_OPENING_TAG}|"
    rf"(?:{_TURN})?(?:{_OPENING_MARK})){_REASONED}(?:{_OPENING_TAG}{_REASONED})*|"
    rf"(?:{_LINE_START}|{_SENTENCE_END}[ \t]+){_DETAILS}",
    _ANYWHERE,
)

# Opened by the chat template before the reply. A tag alone closes it outside of a sentence.
_REASONING_BEFORE = re.compile(
    rf"\A(?:.*?(?:(?:{_LINE_START}|{_SENTENCE_END}[ \t]+|(?<![ \t\"'`(])){_CLOSING_TAG}|"
    rf"{_CLOSING_TAG}(?=\s*(?:[\n{{\[]|```|[-*] |\d+[.)] |\Z))|{_CLOSING_MARK}))+[ \t]*",
    _ANYWHERE,
)

_REASONING_IN_TEXT = re.compile(
    rf"\A(?:\s*{_OPENING_TAG}.*?|.*{_SENTENCE_END}\s+){_CLOSING_TAG}", _ANYWHERE
)
"""What a model that is held to JSON thinks within a string of it."""

_THOUGHTS = (
    r"(?:thinking|thoughts?|reasoning|thought[ _]process|chain[ _]of[ _]thought|scratchpad)"
    r"(?:[ _](?:process|steps))?"
)

_OF_THOUGHTS = re.compile(_THOUGHTS, re.IGNORECASE)

_THOUGHTS_HEADING = re.compile(
    rf"[\W_]*(?:(?:here (?:is|are) )?(?:my|the) )?{_THOUGHTS}[*_]*(?::|[\W_]*$)", re.IGNORECASE
)

_REPLY_HEADING = re.compile(
    r"[\W_]*(?:(?:my|the|final|search) )*(?:quer(?:y|ies)|questions?|answers?|response|output)"
    r"[\W_]*",
    re.IGNORECASE,
)

_THINKS = re.compile(
    r"^(?=.*[.:…。：][\s*_\"')]*$)(?:[\W_]*"
    r"(?:(?:okay|ok|alright|all right|hmm+|well|so|now|first|right)\b[,.:…]*\s+)*"
    r"(?:let(?:'s| me| us) (?:think|see|look|start|begin|read|analy[sz]e|consider|break|figure)\b|"
    r"(?:here'?s (?:a|my) )?thinking process\b|"
    r"(?:(?:i|we) (?:need to|should|must|have to) (?:generate|write|create|produce|find|come up)|"
    r"(?:i|we)(?:'m| am|'re| are) (?:asked|supposed|told|given)|"
    r"the user (?:wants|asks|asked|is asking|has|needs|gave|provided))\b"
    r".*\b(?:quer(?:y|ies)|questions?|claims?|keywords?|json|passage)\b|"
    r"the passage is\b|"
    r"the (?:passage|text) (?:says|describes|mentions|talks|discusses|states|explains)\b)|"
    r"(?:好的|嗯|首先)[，,]?(?:用户|我|让))",
    re.IGNORECASE,
)
"""How reasoning without marks begins: with a whole sentence, since few queries end in a full stop.
"I need" alone may begin one."""

_CHAT_MARK = re.compile(
    rf"{_TURN}|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|\A\s*assistant\s*[:\n]|"
    r"\[END FINAL RESPONSE\]|^[ \t]*<(?:answer|response)>|</(?:answer|response)>[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)

_NAMES_KIND = re.compile(r"(?:question|keyword|claim|how[-_ ]?to)s?", re.IGNORECASE)

_QUOTE = re.compile(r'(?<!\\)(?:\\\\)*"')

_NUMBERS = re.compile(r"\[[\d\s,]*\d[\d\s,]*\]")

_REMAINS = re.compile(  # of JSON; Q1: "..." is none
    r"\s*(?:(?!(?i:Q|Query|Question|Text)\s*\d*\s*:\s*\")[\"']?\w+[\"']?\s*:\s*[\[{\"]|[{\[](?!\d))"
)

_FENCE = re.compile(r"```\w*")

_OPENING = re.compile(r"[{\[](?=\s*[\"'{\[\]}]|\s*$)")

_MARKER = re.compile(
    r"^(?:[-*+•–—→➤►▶●○■▪·✓👉]\s+|[(\[]?\d{1,3}[.):\]、．](?!\d)\s*|\(?[a-h][.)]\s+|"
    r"[A-H]\)\s+|[ivx]{1,4}[.)]\s+|"
    r"(?i:Q|Query|Question|Text)\s*\d*\s*[:.)]\s*|#+\s*)"
)

_KIND = re.compile(
    r"[\W\d_]*(question|keyword|claim|how[-_ ]?to)s?(?: quer(?:y|ies))?[\W\d_]*?:[*_]*\s*",
    re.IGNORECASE,
)

_HEADING = re.compile(
    r"[\W\d_]*(?:(?:kind|type)\W+)?(question|keyword|claim|how[-_ ]?to)s?"
    r"(?: quer(?:y|ies))?[\W\d_]*",
    re.IGNORECASE,
)

_ASKS = r"(?:(?![.!]\s).)*[?？؟]"  # in the same sentence: "I can't log in, what now?" is a query

_PREAMBLE = re.compile(
    r"^(?:here(?:'s| is| are)|sure\b|certainly\b|absolutely\b|of course|okay\b|ok[,.!]|"
    r"below (?:is|are)|the following|let me|note:|"
    rf"i (?:have(?! to)|can|will|hope)\b(?!'t)(?!{_ASKS})|"
    r"(?:generated |search |sample )*(?:queries|questions)\W*$|"
    r"(?:these|the|all|both)(?: \w+)? (?:queries|questions) "
    r"(?:are|cover|ask|focus|should|can|were)\b|"
    r"hier sind|voici\b|aquí\b|claro(?:[,.!:]| que\b))|[:：]$",
    re.IGNORECASE,
)

_REFUSAL = re.compile(
    r"^(?:i'?m (?:sorry|unable)|i am (?:sorry|unable)|sorry\b|unfortunately\b|"
    rf"i (?:can'?t|can ?not|won'?t)\b(?!{_ASKS})|as an ai\b|"
    r"no (?:suitable |relevant |further )?(?:queries|query|questions?) (?:can|could|is|are)\b|"
    r"(?:there is )?not enough information\b)",
    re.IGNORECASE,
)

_GRADE = re.compile(
    r"^\W*(?:(?:passage|document|doc|text)s?[\W_]*)?(\d{1,3})[\s\])*\"'_`]*"
    r"(?:[:：=|.)\]]|[-=]>|→|\s[-–—]\s)[\s\[(|*\"'_`]*"
    r"(?:(?:relevance|grade|score|rating)\w*[\s:：=*_`]*)*(\d)(?!\d|\.\d)",
    re.IGNORECASE,
)

_GRADED_OBJECT = re.compile(
    r"\{[^{}]*?\b(?:passage|document|doc|text|id|number|index)\w*\W+(\d{1,3})\b[^{}]*?"
    r"\b(?:relevance|grade|score|rating)\w*\W+(\d)(?![\d.])",
    re.IGNORECASE,
)

_AFTERTHOUGHT = re.compile(
    r"(?<=[?？؟])[\s\"'*]*(?:\(.*\)|[-–—]*\s*(?:answer|antwort|réponse|respuesta|A)\s*:.*)$",
    re.DOTALL | re.I,
)


def no_query(text: str) -> str | None:
    """The reason "preamble" or "refusal" if the text is one, otherwise None."""
    if _PREAMBLE.search(text):
        return "preamble"
    return "refusal" if _REFUSAL.match(text.replace("’", "'")) else None


def parse_queries(text: str, *, cut: bool = False) -> Parsed:
    """The candidates in a reply.

    Args:
        text: the reply.
        cut: whether it ended at its length limit, so that its last line may be half a query.
    """
    text = strip_reasoning(text)
    for how, value in _json_candidates(text):
        candidates = _collect(value)
        if candidates and _is_open(text, candidates[-1].text, cut):
            return Parsed(candidates[:-1], how, Counter({"cut off": 1}))
        if candidates or how == "schema":  # under the schema, an empty list is an answer
            return Parsed(candidates, how)
    return _lines(text, cut)


def _is_open(text: str, last: str, cut: bool) -> bool:
    """Whether the quote of the last candidate was never closed."""
    if text.endswith(last):
        return True
    parts = _QUOTE.split(text)
    rest = parts[-1].strip()
    begins = rest.partition("\\")[0].strip()  # before the first escape
    return cut and len(parts) % 2 == 0 and rest != "" and last.startswith(begins)


def parse_numbers(text: str) -> list[int] | None:
    """The numbers under "answerable" in the judge's reply; None if there is no such list."""
    text = strip_reasoning(text)
    for _, value in _json_candidates(text):
        numbers = value.get("answerable") if isinstance(value, dict) else value
        if isinstance(numbers, list):
            return [
                int(n)
                for n in numbers
                if isinstance(n, int) or (isinstance(n, str) and n.strip().isdigit())
            ]
    lists = _NUMBERS.findall(text)  # in a fence, or after prose
    return [int(n) for n in re.findall(r"\d+", lists[0])] if len(lists) == 1 else None


def parse_grades(text: str, highest: int) -> dict[int, int]:
    """Number of a passage -> its grade, of lines such as "2: 3", or of a JSON object.

    Args:
        text: the reply. Of a passage that it grades twice, the last grade counts.
        highest: grades above it are none.
    """
    text = strip_reasoning(text)
    by_line = _grades(text.splitlines(), highest)
    # several on a line: "1: 3, 2: 0" or {"1": 3, "2": 0}; or [{"passage": 1, "grade": 3}, ...]
    ways = (_grades(re.split(r"[,;{}\n]", text), highest), _graded_objects(text, highest))
    return max(by_line, *ways, key=len)


def _graded_objects(text: str, highest: int) -> dict[int, int]:
    pairs = _GRADED_OBJECT.findall(text)
    return {int(number): int(grade) for number, grade in pairs if int(grade) <= highest}


def _grades(rows: list[str], highest: int) -> dict[int, int]:
    matches = [match for row in rows if (match := _GRADE.match(row))]
    return {int(match[1]): int(match[2]) for match in matches if int(match[2]) <= highest}


def is_bare_answer(text: str) -> bool:
    """Whether the text is an answer and nothing else: a JSON value, or lines of grades; what a
    model thinks is prose."""
    bare = _FENCE.sub("", text).strip()
    return _load(bare) is not None or (bare != "" and all(map(_GRADE.match, bare.splitlines())))


def strip_reasoning(text: str) -> str:
    """The reply without its reasoning and without the marks of chat templates. In a reply that is
    JSON, they are part of a text."""
    if _load(text) is not None:
        return text.strip()
    text = _REASONING_BEFORE.sub("", _REASONING.sub("\n", text))
    return dedent(_CHAT_MARK.sub(" ", text)).strip()


def _json_candidates(text: str) -> Iterator[tuple[str, Any]]:
    """(how it was read, the JSON value), for each way that yields one, the most faithful first."""
    if (value := _load(text)) is not None:
        yield "schema" if _follows_schema(value) else "json", value
    bare = _FENCE.sub("\n", text)
    if opening := _OPENING.search(bare):
        yield "json", _sequence(bare)
        yield "repaired", _repair(bare[opening.start() :])


def _load(text: str) -> Any:
    """A JSON object or list, also as a string within JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, str):
        return _load(value)
    return value if isinstance(value, dict | list) else None


def _sequence(text: str) -> Any:
    """The JSON values in the text, such as one object per line, or the value if there is one.

    The last one is repaired if it is cut.
    """
    decoder = json.JSONDecoder(strict=False)
    values: list[Any] = []
    opening = _OPENING.search(text)
    while opening:
        try:
            value, at = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            values += [_repair(text[opening.start() :])] if values else []
            break
        values.append(value)
        opening = _OPENING.search(text, at)
    return values if len(values) > 1 else values[0] if values else None


def _repair(text: str) -> Any:
    """The text read by json-repair, without prose after the last bracket if brackets balance."""
    if all(text.count(opening) <= text.count(closing) for opening, closing in ("{}", "[]")):
        text = text[: max(text.rfind("}"), text.rfind("]")) + 1]
    try:
        return json_repair.loads(text)
    except (ValueError, RecursionError):  # nested too deeply: later versions and earlier ones
        return None


def _follows_schema(value: Any) -> bool:
    def is_query(q: Any) -> bool:
        return (
            isinstance(q, dict)
            and q.keys() == {"kind", "text"}
            and all(isinstance(v, str) for v in q.values())
        )

    return (
        isinstance(value, dict)
        and value.keys() == {"queries"}
        and isinstance(value["queries"], list)
        and all(map(is_query, value["queries"]))
    )


def _collect(value: Any, kind: str | None = None, depth: int = 0) -> list[Candidate]:
    """Every text in the value: strings of a list, texts of objects, lists named after a kind."""
    if depth > 4:
        return []
    if isinstance(value, str):
        # JSON may escape half a surrogate pair
        text = _REASONING_IN_TEXT.sub("", whole_characters(value)).strip()
        return [Candidate(_AFTERTHOUGHT.sub("", text), kind)] if text else []
    if isinstance(value, list):
        return [candidate for item in value for candidate in _collect(item, kind, depth + 1)]
    if not isinstance(value, dict):
        return []
    stated = next((value[key] for key in _KIND_KEYS if isinstance(value.get(key), str)), None)
    if _OF_THOUGHTS.fullmatch(str(value.get("type"))):
        return []
    kind = stated or kind
    for key in _TEXT_KEYS:  # "question" beside "claim" is one query of several
        if isinstance(value.get(key), str) and (stated or not _NAMES_KIND.fullmatch(key)):
            return _collect(value[key], kind, depth + 1)
    return [
        candidate
        for key, item in value.items()
        if key not in _KIND_KEYS
        and not _OF_THOUGHTS.fullmatch(key)
        and (
            isinstance(item, list | dict)
            or _NAMES_KIND.fullmatch(key)
            or re.fullmatch(r"(?:[a-zA-Z]+[ _]?)?\d+", key)
        )
        for candidate in _collect(
            item, kind if key == "queries" else kind or _singular(key), depth + 1
        )
    ]


def _singular(key: str) -> str | None:
    """The kind that a list is named after: "questions" -> "question"; None for "1" or "result"."""
    match = re.match(r"(question|keyword|claim|how[-_ ]?to)", key.lower())
    kinds = {"q": "question", "k": "keywords", "c": "claim", "h": "how-to"}
    return kinds[match[1][0]] if match else None


def _lines(text: str, cut: bool) -> Parsed:
    """Marked lines where there are any, otherwise every line.

    A heading such as "Keywords:" gives its kind to the lines below. Of marked lines the outermost
    count, since explanations are indented under their query. Remains of JSON do not count.
    """
    text = re.sub(r"(?<=\?)\s+(?=\(?\d{1,2}[.)]\s)", "\n", text)  # "1. ...? 2. ...?"
    rows = [row for row in text.splitlines() if re.search(r"[^\s`{}\[\]\",=]", row)]
    rows = [row for row in rows if not _REMAINS.match(row)]
    thinks = bool(rows) and _THINKS.match(rows[0].replace("’", "'")) is not None
    if rows and _THOUGHTS_HEADING.match(rows[0]):
        headings = [i for i, row in enumerate(rows) if _REPLY_HEADING.fullmatch(row)]
        rows, thinks = rows[headings[0] :] if headings else [], not headings
    if thinks:
        return Parsed([], "nothing", Counter({"reasoning": 1}))
    listed = [row for row in rows if _marked(row) and not _HEADING.fullmatch(row)]
    outermost = min(map(_indent, listed), default=0)
    dropped: Counter[str] = Counter()
    candidates: list[Candidate] = []
    kind = None
    for row in rows:
        if heading := _HEADING.fullmatch(row):
            kind = _singular(heading[1])
            continue
        named = _KIND.match(row)
        cleaned = _clean(row[named.end() :] if named else row)
        if reason := no_query(cleaned):
            dropped[reason] += 1
        elif (
            cleaned
            and listed
            and not (row is listed[0] or (_marked(row) and _indent(row) == outermost))
        ):
            dropped["beside the list"] += 1
        elif cleaned:
            candidates.append(Candidate(cleaned, _singular(named[1]) if named else kind))
    if cut and candidates:
        candidates.pop()
        dropped["cut off"] += 1
    return Parsed(candidates, "lines" if candidates else "nothing", dropped)


def _marked(row: str) -> bool:
    return (_MARKER.match(row.strip()) or _KIND.match(row)) is not None


def _indent(row: str) -> int:
    return len(row) - len(row.lstrip())


def _clean(row: str) -> str:
    row, previous = row.strip(), None
    while row != previous:  # "1. **Q1: text**" has three layers
        previous = row
        row = _MARKER.sub("", row).strip()
        row = re.sub(r"^(\*\*|__|\*|`)(.+?)\1$", r"\2", row).strip()
        row = re.sub(r'^["\'“‘«](.+?)["\'”’»],?$', r"\1", row).strip()
    return _AFTERTHOUGHT.sub("", row)
