"""Words, normalization and passage text: how every room reads a string."""

from __future__ import annotations

import unicodedata

import regex

CJK = r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}]"
SOUTHEAST_ASIAN = (
    r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}"
    r"\p{Javanese}\p{Balinese}]"
)
UNSPACED = rf"[{CJK}||{SOUTHEAST_ASIAN}]"
"""Scripts that are written without blanks between words, as a set for ``regex`` (version 1)."""

# One character with its combining marks and the consonants stacked below it (Khmer, Burmese).
_CLUSTER = rf"[\w&&{UNSPACED}](?:[\u17d2\u1039]\w|[\p{{M}}\u200c\u200d])*"
_SPACED = rf"[[\w\p{{N}}]--{UNSPACED}]"  # \p{N}: "x²" is one word
_SPACED_WORD = rf"{_SPACED}(?:{_SPACED}|[\p{{M}}\u200c\u200d])*"
_WORD = regex.compile(rf"(?V1){_CLUSTER}|{_SPACED_WORD}")
_IS_CJK = regex.compile(rf"(?V1){CJK}")
_IS_UNSPACED = regex.compile(rf"(?V1){UNSPACED}")
_HANGUL = regex.compile(r"\p{Hangul}")

_WORDS_PER_CJK_CHARACTER = 2 / 3
_WORDS_PER_CLUSTER = 1 / 3
_WORDS_PER_HANGUL_SYLLABLE = 1 / 3  # one blank-separated unit holds a noun and its particles


def words(text: str) -> list[str]:
    """The words of a text, in any script, combining marks included.

    In scripts written without blanks between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese)
    each character with its marks is a word.
    """
    return _WORD.findall(text)


def word_count(text: str) -> float:
    """The estimated number of words, so that lengths compare between scripts.

    Equal to ``len(words(text))`` where blanks separate words. In scripts without blanks, a Chinese
    or Japanese character counts as 2/3 of a word, a Thai, Lao, Khmer or Burmese one as 1/3.
    """
    count = 0.0
    for word in words(text):
        if _IS_CJK.match(word):
            count += _WORDS_PER_CJK_CHARACTER
        elif _IS_UNSPACED.match(word):
            count += _WORDS_PER_CLUSTER
        elif _HANGUL.match(word):
            count += max(1.0, len(word) * _WORDS_PER_HANGUL_SYLLABLE)
        else:
            count += 1
    return count


def whole_characters(text: str) -> str:
    """The text with surrogate pairs joined, and halves of them, which no tokenizer and no file
    takes, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def normalize(text: str) -> str:
    """The text in NFKC, case folded, with every run of blanks made one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normalized_words(text: str) -> str:
    """The words of the normalized text, joined by blanks: punctuation does not count either."""
    return " ".join(words(normalize(text)))


def passage_text(title: str, text: str) -> str:
    """What a model sees of a passage: BEIR's convention, ``title + " " + text``."""
    return f"{title} {text}".strip()
