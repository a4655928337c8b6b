"""Words, normalization and passage text: how every room reads a string."""

from __future__ import annotations

import re
import unicodedata


def words(text: str) -> list[str]:
    """In scripts written without blanks (Chinese, Japanese, Thai) a character is a word."""
    return re.findall(
        r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|\w+?(?=[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|\b)",
        text,
    )


def normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def passage_text(title: str, text: str) -> str:
    """What a model sees of a passage: BEIR's convention, ``title + " " + text``."""
    return f"{title} {text}".strip()
