"""Words in every script."""

from __future__ import annotations

import pytest

from refine_fast.pipeline.corpus.text import normalize, normalized_words, word_count, words

TWO_WORDS = {
    "English": "signing keys",
    "Russian": "ключи подписи",
    "Hindi": "हस्ताक्षर कुंजियाँ",
    "Tamil": "கையொப்ப விசைகள்",
    "Arabic, pointed": "تُبدَّل مفاتيح",
    "Hebrew, pointed": "שָׁלוֹם עוֹלָם",
    "Persian, with a joiner": "می‌خواهم کتاب",
    "Korean": "서명 키는",
    "Turkish": "imza anahtarı",
    "Vietnamese": "khóa ký",
    "Vietnamese, decomposed": "kho\u0301a ky\u0301",
}


@pytest.mark.parametrize("language", TWO_WORDS)
def test_marks_belong_to_their_word(language: str) -> None:
    text = TWO_WORDS[language]
    assert words(f"«{text}»!") == text.split()
    assert word_count(text) == 2


@pytest.mark.parametrize(
    ("text", "characters", "count"),
    [
        ("签名密钥，轮换。", list("签名密钥轮换"), 4),
        ("バー々です", list("バー々です"), 10 / 3),
        ("กุญแจ ถูก", ["กุ", "ญ", "แ", "จ", "ถู", "ก"], 2),
        ("ຖືກປ່ຽນ", ["ຖື", "ກ", "ປ່", "ຽ", "ນ"], 5 / 3),
        ("ហត្ថលេខា។", ["ហ", "ត្ថ", "លេ", "ខា"], 4 / 3),
        ("ထိုးသော့။", ["ထိုး", "သော့"], 2 / 3),
    ],
    ids=["Chinese", "Japanese", "Thai", "Lao", "Khmer", "Burmese"],
)
def test_scripts_without_blanks(text: str, characters: list[str], count: float) -> None:
    assert words(text) == characters
    assert word_count(text) == pytest.approx(count)


def test_mixed_scripts() -> None:
    assert words("iPhone手机 v2") == ["iPhone", "手", "机", "v2"]
    assert word_count("비밀번호변경정책") > 2  # one unit, several nouns


def test_normalize() -> None:
    assert normalize("  Straße\n\tＡ１ ") == "strasse a1"
    assert normalized_words("“Straße”, Ａ１!") == "strasse a1"
