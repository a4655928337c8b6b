"""The language of documents, by their script and, if py3langid is installed, their words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

SAMPLE_TEXTS, SAMPLE_CHARACTERS = 200, 500
"""Texts that are looked at, spread evenly, and how much of each."""

MIN_CERTAINTY = 0.95
"""Probability from which py3langid's answer counts."""

_SCRIPTS = (
    *("Latin", "Han", "Hiragana", "Katakana", "Hangul", "Thai", "Lao", "Khmer", "Myanmar"),
    *("Devanagari", "Bengali", "Tamil", "Telugu", "Arabic", "Hebrew", "Cyrillic", "Greek"),
    *("Armenian", "Georgian", "Ethiopic"),
)
_LANGUAGES = {
    "Han": "zh",
    "Hiragana": "ja",
    "Katakana": "ja",
    "Hangul": "ko",
    "Thai": "th",
    "Lao": "lo",
    "Khmer": "km",
    "Myanmar": "my",
    "Devanagari": "hi",
    "Bengali": "bn",
    "Tamil": "ta",
    "Telugu": "te",
    "Arabic": "ar",
    "Hebrew": "he",
    "Cyrillic": "ru",
    "Greek": "el",
    "Armenian": "hy",
    "Georgian": "ka",
    "Ethiopic": "am",
}
"""Script -> the language with the most readers, where the script does not tell."""
_LETTER = regex.compile("|".join(rf"(?P<{name}>\p{{{name}}})" for name in _SCRIPTS))


def other_language(texts: Sequence[str]) -> str | None:
    """What most of the texts are written in, such as "the Thai script" or "the language 'de'"; None
    if that is English or unknown."""
    step = max(1, len(texts) // SAMPLE_TEXTS)
    sample = [text[:SAMPLE_CHARACTERS] for text in texts[::step]]
    scripts = Counter(match.lastgroup for text in sample for match in _LETTER.finditer(text))
    if not scripts:
        return None
    if 2 * scripts["Latin"] < scripts.total():
        return f"the {scripts.most_common(1)[0][0]} script"
    languages = _identified(sample)
    if 2 * (languages.total() - languages["en"]) <= len(sample):
        return None
    return f"the language {languages.most_common(1)[0][0]!r}"


def languages_of(texts: Sequence[str]) -> list[str]:
    """The ISO 639-1 code of each text's language, by its script. In the Latin script it is what
    most of the texts are in, and "en" without py3langid."""
    scripts = [
        Counter(match.lastgroup for match in _LETTER.finditer(text[:SAMPLE_CHARACTERS]))
        for text in texts
    ]
    latin = [text for text, found in zip(texts, scripts, strict=True) if _main(found) == "Latin"]
    step = max(1, len(latin) // SAMPLE_TEXTS)
    languages = _identified([text[:SAMPLE_CHARACTERS] for text in latin[::step]])
    codes = _LANGUAGES | {"Latin": languages.most_common(1)[0][0] if languages else "en"}
    return [codes[_main(found)] for found in scripts]


def _main(scripts: Counter[str | None]) -> str:
    """The script of most letters; Japanese also where most are Chinese characters."""
    if scripts["Hiragana"] + scripts["Katakana"] > 0.1 * scripts.total():
        return "Hiragana"
    return str(scripts.most_common(1)[0][0]) if scripts else "Latin"


def identifier() -> LanguageIdentifier:
    """py3langid's own model, read anew: it takes 74 MB, which training needs more.

    Raises:
        ImportError: if py3langid is not installed.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _identified(sample: Sequence[str]) -> Counter[str]:
    """Language -> texts that py3langid is sure of; empty if it is not installed."""
    try:
        answers = map(identifier().classify, sample)
    except ImportError:
        return Counter()
    return Counter(name for name, certainty in answers if certainty >= MIN_CERTAINTY)
