"""Questions that an English sentence answers, made from it by rules of grammar.

Only sentences whose clause can be told apart for certain are used: a short subject, a verb of
english.json, and what follows. "The crane was built by Arrol in 1908" makes "Who built the
crane in 1908?" and "When was the crane built by Arrol?".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import regex

MAX_SUBJECT, MAX_REST = 8, 14
"""Most words of a subject, and of what follows the verb."""


def _read() -> Mapping[str, str]:
    source = resources.files(__package__) / "english.json"
    return dict(json.loads(source.read_text(encoding="utf-8")))


_LISTS = _read()
"""Words of english.json: verbs as base:past:participle (irregular) or base form alone (regular, of
which "doubled" double their last letter), those of them whose third person is mostly a noun, and
those whose subject is mostly a person ("personal"); words with which no subject begins
("not_first") and no subject or question ends ("not_last"); relative pronouns; and words that point
outside the sentence ("vague")."""

_NOT_FIRST, _NOT_LAST, _RELATIVE, _VAGUE, _PERSONAL, _NOUNS = (
    frozenset(_LISTS[name].split())
    for name in ("not_first", "not_last", "relative", "vague", "personal", "nouns")
)

_BE = frozenset({"is", "are", "was", "were"})
_HAVE = frozenset({"has", "have", "had"})
_SINGULAR = {"are": "is", "were": "was", "have": "has"}
_MODAL = frozenset({"can", "could", "may", "might", "must", "shall", "should", "will", "would"})
_DO = {"past": "did", "third": "does", "base": "do"}

_CONNECTIVE = regex.compile(
    r"^(?:However|Moreover|Furthermore|Nevertheless|Nonetheless|Therefore|Thus|Hence|Also|Indeed|"
    r"Additionally|Finally|Similarly|Consequently|Interestingly|Notably|Importantly|Currently|"
    r"Today|Traditionally|Generally|Historically|Typically|Instead|Meanwhile|Overall|"
    r"In addition|In particular|In general|In contrast|In fact|In summary|In short|In other words|"
    r"For example|For instance|As a result|On the other hand|On the contrary|At present|"
    r"Of course|And|But|So|Yet)(?:,\s*|\s+(?=[a-z]))"
)
_POINTING_BACK = regex.compile(
    r"(?:,\s(?P<word>also|consequently|however|likewise|moreover|nevertheless|nonetheless|similarly|"
    r"therefore|thus),|\s(?&word)(?!\w))"
)
"""An adverb that joins the sentence to the one before, of which a question knows nothing."""
_QUOTES = regex.compile(r"[\"“”„«»`]|(?<!\w)['‘*]+(?=\w)|(?<=\w)['’*]+(?!\w)")
_ASIDE = regex.compile(r"\s*(?:\([^()]*\)|\[[^\[\]]*\])")
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_YEAR = r"(?:1\d|20)\d\ds?"
_DATE = regex.compile(
    rf"\b(?:in|on|by|since|during|until|around|about)\s+(?:(?:early|late|mid|the|about)[\s-]+)*"
    rf"(?:(?:\d{{1,2}}\s+)?{_MONTH}(?:\s+\d{{1,2}}\b)?(?:\s+{_YEAR})?|(?:the )?{_YEAR})"
    r"(?![\w%-]|\s?[–-]\s?\d|\s(?:and|or|to|until)\s\p{Lu}?\w*\s?\d)",
    regex.IGNORECASE,
)
_OPENING = regex.compile(r"^((?:In|On|By|Since|During|At|From|After|Before|Until)\s[^,]{2,40}),\s+")
_END_OF_CLAUSE = regex.compile(
    r"[,:](?!\d)|[;—–]|\s-+\s|\s(?:which|who|whose|while|whereas|although|though|but|because|"
    r"since|so that|where|if|unless|"
    r"and (?:it|he|she|they|its|his|her|their|this|the|is|was|are|were|has|had))\b"
)
_BECAUSE = regex.compile(r"\sbecause\b(?! of the fact)")
_OTHER = regex.compile(r"^(?:(?!\bthat\b).)*\b(?:is|are|was|were|has|have|had)\b")
_OBJECT = regex.compile(r"(?:an?|the|that|to|its|their|no|all|both|several|many|more|\d\S*)\s")
_PLACE = regex.compile(
    r"^(.{3,}?)\s(?:in|at|near)\s((?:the )?\p{Lu}[\w'’.-]*(?:\s(?:of |the )?\p{Lu}[\w'’.-]*)*)$"
)
_NUMBER = regex.compile(
    r"^(?:about |approximately |around |roughly |nearly |almost |over |more than |fewer than |"
    r"at least |up to |only |some )?"
    r"(?:\d[\d,]*(?:\.\d+)?|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|"
    r"thirty|forty|fifty|hundreds of|thousands of)(?: (?:million|billion|thousand|hundred))?\s+"
    r"((?:(?!and\b|or\b|of\b)[\p{Ll}-]+\s){0,2}?"
    r"(?:(?!years|percent|times)[\p{Ll}-]{3,}s|people|men|women|children))"
    r"((?:\s.*)?)$"
)
_AGENT = regex.compile(
    r"^(.*?)\s?\bby\s+((?:the |an? )?[\p{L}'’.-]+(?:\s(?:of |the |de |von )?[\p{L}'’.-]+){0,4}?)"
    r"((?:\s(?:in|on|at|for|from|to|with|as|during|after)\s.*)?)$"
)
_NAME = regex.compile(r"^\p{Lu}[\p{L}'’.-]+(?:\s(?:(?:of|de|von|van|the)\s)?\p{Lu}[\p{L}'’.-]*)+$")


@dataclass(frozen=True)
class Clause:
    """The main clause of a sentence."""

    subject: str
    verb: str
    """As it is written."""
    base: str
    tense: str
    """"past", "third" (person singular) or "base"; "auxiliary" if the verb itself moves to the
    front of a question."""
    rest: str
    reason: bool = False
    """Whether the sentence goes on with "because"."""


def english_questions(sentence: str) -> dict[str, str]:
    """Questions that the sentence answers.

    Args:
        sentence: one sentence.

    Returns:
        Form of the question ("when", "who", "how many", "why", "where", "what is" or "subject")
        -> the question. Empty where the sentence's clause cannot be told apart.
    """
    clause = main_clause(sentence)
    if clause is None:
        return {}
    found: dict[str, str] = {}
    for form, question in _questions(clause):
        words = question.rstrip("?").split()
        if 4 <= len(words) <= MAX_SUBJECT + MAX_REST and words[-1].lower() not in _NOT_LAST:
            found.setdefault(form, question)
    return found


def main_clause(sentence: str) -> Clause | None:
    """The main clause; None if its subject or its verb cannot be told for certain.

    A date or place before it ("In 1908, ...") is put at its end.
    """
    text = _CONNECTIVE.sub("", _ASIDE.sub("", _QUOTES.sub("", sentence)).strip())
    text = _POINTING_BACK.sub("", text).rstrip(" .!")
    if not text or text.endswith("?") or any(bracket in text for bracket in "()[]{}"):
        return None
    opening = _OPENING.match(text)
    if opening:
        text = text[opening.end() :]
    words = text.split()
    verbs = [i for i, word in enumerate(words) if _verb(word) is not None]
    # Of two in a row, such as "numbers are", the first is a noun, unless it is an auxiliary.
    at = next(
        (i for i in verbs if i + 1 not in verbs or words[i].lower() in _BE | _HAVE | _MODAL), None
    )
    if at is None or not 1 <= at <= MAX_SUBJECT:
        return None
    subject = words[:at]
    if words[at - 1].lower() in ("to", "not") or not _is_subject(subject):
        return None
    verb = words[at].lower()
    base, tense = _verb(words[at]) or ("", "")
    rest = " ".join(words[at + 1 :])
    because = _BECAUSE.search(rest)
    end = _END_OF_CLAUSE.search(rest)
    rest = _one_predicate(rest[: end.start()] if end else rest)
    if verb in _HAVE and _is_participle(rest):  # "has twelve regions" asks with "does"
        tense = "auxiliary"
    if not rest or len(rest.split()) > MAX_REST:
        return None
    first = rest.split()[0]
    if tense != "auxiliary" and (first == "by" or _OTHER.search(rest)):
        return None  # the first verb was a noun or a participle
    if tense == "third" and base in _NOUNS and not _OBJECT.match(rest):
        return None
    if opening:
        rest = f"{rest} {opening[1][0].lower()}{opening[1][1:]}"
    if subject[0] in ("The", "A", "An") or (at > 1 and subject[1].islower()):
        subject[0] = subject[0].lower() if subject[0].istitle() else subject[0]
    return Clause(" ".join(subject), verb, base, tense, rest, because is not None)


def _one_predicate(rest: str) -> str:
    """The part of a clause before "and" and a second verb."""
    words = rest.split()
    for at, word in enumerate(words):
        after = [other for other in words[at + 1 : at + 3] if not other.endswith("ly")]
        if word == "and" and at and after and _verb(after[0]) is not None:
            return " ".join(words[:at])
    return rest


def _is_subject(words: list[str]) -> bool:
    lower = [word.lower() for word in words]
    return not (
        any(word[-1] in ",;:" for word in words)
        or lower[0] in _NOT_FIRST
        or lower[-1] in _NOT_LAST | _RELATIVE
        or lower[-1].endswith("ly")
        or any(word in _RELATIVE | _VAGUE for word in lower)
        or not any(c.isalpha() for c in lower[-1])
        or not words[0][0].isalnum()
    )


def _questions(clause: Clause) -> Iterator[tuple[str, str]]:
    dangling = _VAGUE & {word.lower() for word in clause.rest.split()}
    negated = regex.search(r"\b(?:not|no|never)\b", clause.rest)
    date = None if negated else _DATE.search(clause.rest)
    if date:
        rest = _joined(clause.rest[: date.start()], clause.rest[date.end() :])
        if rest or clause.tense != "auxiliary":
            yield "when", _inverted("When", clause, rest)
    if clause.verb in _BE and not dangling and (agent := _AGENT.match(clause.rest)):
        made = _by_agent(clause, agent)
        if made:
            yield "who", made
    if clause.tense != "auxiliary" and (number := _NUMBER.match(clause.rest)):
        yield "how many", _inverted(f"How many {number[1]}", clause, number[2].strip())
    if clause.reason and clause.tense == "auxiliary":
        yield "why", _inverted("Why", clause, clause.rest)
    if not date and not negated and (clause.verb in _BE or clause.tense == "past"):
        place = _PLACE.match(clause.rest)
        if place and not (clause.verb in _BE and place[1].split()[0] in ("a", "an", "the", "one")):
            yield "where", _inverted("Where", clause, place[1])
    is_attribute = regex.match(r"the \w+(?: \w+)? (?:of|for|in|between) ", clause.subject)
    if is_attribute and clause.verb in _BE and not _is_participle(clause.rest):
        yield "what is", f"What {clause.verb} {clause.subject}?"
    if not dangling and len(clause.rest.split()) >= 3:
        yield "subject", _about_subject(clause)


def _about_subject(clause: Clause) -> str:
    """The question whose answer is the subject, or the number in front of it."""
    number = _NUMBER.match(clause.subject)
    if number:
        return _question(f"How many {number[1]}{number[2]}", clause.verb, clause.rest)
    person = clause.base in _PERSONAL and _NAME.match(clause.subject)
    verb = _SINGULAR.get(clause.verb, clause.verb)
    if clause.rest.startswith("the ") and clause.verb in _BE:
        verb = clause.verb  # "are the coldest months"
    if clause.tense == "base" and clause.verb not in _HAVE:
        verb = _third(clause.base)
    return _question("Who" if person else "What", verb, clause.rest)


def _by_agent(clause: Clause, agent: regex.Match[str]) -> str | None:
    """The active question to a passive clause: "was built by Arrol" -> "Who built ...?"."""
    before, name, after = agent[1].strip(), agent[2], agent[3]
    *adverbs, participle = before.split() or [""]
    base = _participles().get(participle.lower())
    # what is done by doing something has no agent in this sentence
    if base is None or any(word.islower() and word.endswith("ing") for word in name.split()):
        return None
    if any(not word.lower().endswith("ly") for word in adverbs):
        return None
    verb = _past(base) if clause.verb in ("was", "were") else _third(base)
    who = "Who" if name[0].isupper() else "What"
    return _question(who, *adverbs, verb, clause.subject, after)


def _inverted(asked: str, clause: Clause, rest: str) -> str:
    if clause.tense == "auxiliary":
        return _question(asked, clause.verb, clause.subject, rest)
    return _question(asked, _DO[clause.tense], clause.subject, clause.base, rest)


def _question(*parts: str) -> str:
    return " ".join(" ".join(parts).split()).rstrip(" ,.") + "?"


def _joined(before: str, after: str) -> str:
    return " ".join(f"{before} {after}".split()).strip(" ,")


def _verb(word: str) -> tuple[str, str] | None:
    """(base form, tense) of a word that is most likely a verb."""
    plain = word.lower()
    if plain in _MODAL:
        return plain, "auxiliary"
    if plain in _BE:
        return "be", "auxiliary"
    if plain in _HAVE:
        return "have", {"has": "third", "had": "past", "have": "base"}[plain]
    form = _forms().get(plain) if word[:1].islower() else None
    # The base form of most verbs is a noun as well ("the study", "a force").
    return form if form is not None and form[1] != "base" else None


def _is_participle(rest: str) -> bool:
    first = next((word for word in rest.lower().split() if not word.endswith("ly")), "")
    return first == "been" or first in _participles() or first.endswith("ed")


@cache
def _table() -> list[tuple[str, str, str]]:
    """(base, past, participle) of every verb that is known."""
    doubled = set(_LISTS["doubled"].split())
    verbs = [tuple(entry.split(":")) for entry in _LISTS["irregular"].split()]
    for base in _LISTS["regular"].split():
        if base.endswith("e"):
            past = base + "d"
        elif base.endswith("y") and base[-2] not in "aeiou":
            past = base[:-1] + "ied"
        else:
            past = (base + base[-1] if base in doubled else base) + "ed"
        verbs.append((base, past, past))
    return [(base, past, participle) for base, past, participle in verbs]


@cache
def _forms() -> Mapping[str, tuple[str, str]]:
    """Form of a verb -> (base form, tense)."""
    forms = {base: (base, "base") for base, _, _ in _table()}
    for base, past, participle in _table():
        forms.setdefault(participle, (base, "participle"))
        forms[past] = (base, "past")
        forms[_third(base)] = (base, "third")
    return {form: found for form, found in forms.items() if found[1] != "participle"}


@cache
def _participles() -> Mapping[str, str]:
    """Past participle -> base form."""
    return {participle: base for base, _, participle in _table()}


def _past(base: str) -> str:
    return next(past for own, past, _ in _table() if own == base)


def _third(base: str) -> str:
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ies"
    return base + ("es" if base.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
