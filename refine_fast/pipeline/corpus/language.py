"""Whether documents are in English, by their script and, if py3langid is installed, language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import regex

SAMPLE_TEXTS, SAMPLE_CHARACTERS = 200, 500
"""Texts that are looked at, spread evenly, and how much of each."""

MIN_CERTAINTY = 0.95
"""Probability from which py3langid's answer counts."""

_SCRIPTS = (
    *("Latin", "Han", "Hiragana", "Katakana", "Hangul", "Thai", "Lao", "Khmer", "Myanmar"),
    *("Devanagari", "Bengali", "Tamil", "Telugu", "Arabic", "Hebrew", "Cyrillic", "Greek"),
    *("Armenian", "Georgian", "Ethiopic"),
)
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
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    answers = map(identifier.classify, sample)
    languages = Counter(name for name, certainty in answers if certainty >= MIN_CERTAINTY)
    if 2 * (languages.total() - languages["en"]) <= len(sample):
        return None
    return f"the language {languages.most_common(1)[0][0]!r}"
