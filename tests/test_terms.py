"""BM25 and near duplicates in every language."""

from __future__ import annotations

import pytest

pytest.importorskip("bm25s", reason="needs the pipeline: pip install '.[pipeline]'")

from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.dedup import deduplicate
from refine_fast.pipeline.corpus.terms import search_terms

# Language -> a passage on signing keys, one on backups, a question about each.
TEXTS = {
    "zh": (
        "签名密钥每九十天轮换一次，旧密钥在更换后仍有效一周。",
        "备份每天凌晨两点进行，在第二站点保存三十天。",
        "签名密钥多久轮换一次？",
        "备份什么时候进行？",
    ),
    "ja": (
        "署名鍵は九十日ごとに交換されます。古い鍵は一週間有効です。",
        "バックアップは毎日午前二時に取得されます。",
        "署名鍵の交換間隔は？",
        "バックアップはいつ取得されますか？",
    ),
    "ko": (
        "서명 키는 구십 일마다 운영 팀이 교체합니다.",
        "백업은 매일 새벽 두 시에 수행되며 삼십 일 동안 보관됩니다.",
        "서명키 교체 주기는?",
        "백업을 언제 수행하나요?",
    ),
    "th": (
        "กุญแจลงนามจะถูกเปลี่ยนทุกเก้าสิบวันโดยทีมปฏิบัติการ",
        "การสำรองข้อมูลทำทุกวันเวลาตีสอง และเก็บไว้สามสิบวัน",
        "กุญแจลงนามเปลี่ยนบ่อยแค่ไหน",
        "สำรองข้อมูลเมื่อไร",
    ),
    "km": (
        "សោហត្ថលេខាត្រូវបានផ្លាស់ប្តូររៀងរាល់កៅសិបថ្ងៃ។",
        "ការបម្រុងទុកត្រូវបានធ្វើរៀងរាល់ថ្ងៃនៅម៉ោងពីរព្រឹក។",
        "តើសោហត្ថលេខាត្រូវផ្លាស់ប្តូរញឹកញាប់ប៉ុណ្ណា?",
        "តើការបម្រុងទុកធ្វើនៅម៉ោងណា?",
    ),
    "my": (
        "လက်မှတ်ထိုးသော့များကို ရက်ကိုးဆယ်တိုင်း လဲလှယ်သည်။",
        "အရန်သိမ်းဆည်းမှုကို နေ့စဉ် မနက်နှစ်နာရီတွင် ပြုလုပ်သည်။",
        "လက်မှတ်ထိုးသော့ကိုဘယ်နှစ်ရက်တစ်ခါလဲသလဲ?",
        "အရန်သိမ်းဆည်းမှုကို ဘယ်အချိန်လုပ်သလဲ?",
    ),
    "lo": (
        "ກະແຈລາຍເຊັນຖືກປ່ຽນທຸກເກົ້າສິບວັນ",
        "ການສຳຮອງຂໍ້ມູນເຮັດທຸກມື້ເວລາຕີສອງ",
        "ກະແຈລາຍເຊັນຖືກປ່ຽນເລື້ອຍປານໃດ?",
        "ສຳຮອງຂໍ້ມູນເວລາໃດ?",
    ),
    "hi": (
        "हस्ताक्षर कुंजियाँ हर नब्बे दिन में बदली जाती हैं।",
        "बैकअप हर रात दो बजे लिया जाता है।",
        "हस्ताक्षर कुंजी कब बदलती है?",
        "बैकअप कब लिया जाता है?",
    ),
    "ta": (
        "கையொப்ப விசைகள் ஒவ்வொரு தொண்ணூறு நாட்களுக்கும் மாற்றப்படுகின்றன.",
        "காப்புப்பிரதிகள் தினமும் அதிகாலை இரண்டு மணிக்கு எடுக்கப்படுகின்றன.",
        "கையொப்ப விசை எப்போது மாறும்?",
        "காப்புப்பிரதி எப்போது எடுக்கப்படுகிறது?",
    ),
    "ar": (
        "تُبدَّل مفاتيحُ التوقيعِ كلَّ تسعين يومًا من قبل فريق العمليات.",
        "تؤخذ النسخ الاحتياطية كل يوم عند الساعة الثانية صباحًا.",
        "متى تبدل مفاتيح التوقيع؟",
        "متى تؤخذ النسخ الاحتياطية؟",
    ),
    "he": (
        "מַפְתְּחוֹת החתימה מוחלפים כל תשעים יום.",
        "הגיבויים נעשים בכל לילה בשעה שתיים.",
        "מתי מוחלפים מפתחות?",
        "מתי נעשים הגיבויים?",
    ),
    "ru": (
        "Ключи подписи меняются каждые девяносто дней.",
        "Резервные копии делаются в два часа ночи.",
        "Как часто менять ключ подписей?",
        "Когда делать резервную копию?",
    ),
    "tr": (
        "İmza anahtarları doksan günde bir değiştirilir.",
        "YEDEKLER HER GECE SAAT İKİDE ALINIR.",
        "imza anahtarları ne zaman değiştirilir?",
        "yedekler ne zaman alınır?",
    ),
    "vi": (
        "Khóa ký được thay đổi chín mươi ngày một lần.",
        "Bản sao lưu được thực hiện lúc hai giờ sáng.",
        "kho\u0301a ky\u0301 bao lâu thay một lần?",
        "sao l\u01b0u lúc mấy giờ?",
    ),
}


@pytest.mark.parametrize("language", TEXTS)
def test_a_question_shares_its_terms_with_its_passage(language: str) -> None:
    keys, backups, about_keys, about_backups = map(set, search_terms(TEXTS[language]))
    assert len(about_keys & keys) >= 2
    assert len(about_backups & backups) >= 2
    assert len(about_keys & keys) > len(about_keys & backups)
    assert len(about_backups & backups) > len(about_backups & keys)


@pytest.mark.parametrize("language", TEXTS)
def test_near_duplicates(language: str) -> None:
    keys, backups, *_ = TEXTS[language]
    long = f"{keys} {backups} " * 3
    texts = [long, f"{long} {keys}", f"{backups} {backups}"]
    chunks = [Chunk(str(i), text, "", str(i), 0, len(text)) for i, text in enumerate(texts)]
    kept, removed = deduplicate(chunks)
    assert [chunk.id for chunk in kept] == ["0", "2"]
    assert removed.near == 1


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The pumps' VALVES, a 3-way x² of it", "pump valv way x²"),
        ("iPhone15手机壳 ＡＢ１２", "iphone15 手机 机壳 ab12"),
        ("キー と ｷｰﾜｰﾄﾞ", "キー と キー ーワ ワー ード"),
        ("키를 값", "키를 값"),
        ("ตีสอง", "ตีส สอ อง"),
        ("IŞIK ışık", "işik işik"),
        ("می‌خواهم", "میخواهم"),
        ("", ""),
    ],
)
def test_terms(text: str, terms: str) -> None:
    assert [" ".join(found) for found in search_terms([text])] == [terms]


def test_english_terms_are_those_of_bm25s() -> None:
    import bm25s
    import Stemmer

    texts = [
        "Its café-owner's _private name_ and the naïve 2nd model's 3.5 GHz (TCP/IP) e-mail.",
        "Naming the winners: rivers were crossed, not fished; résumés at 10 m², ½ cup, 5 cm³, "
        "2 µm, x_1, 17α, β-cells, βars.",
    ]
    expected = bm25s.tokenize(
        texts, stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False,
        show_progress=False,
    )  # fmt: skip
    assert search_terms(texts) == expected
