"""Queries that speak of "the passage", which nobody has before them who searches."""

from __future__ import annotations

import unicodedata

import regex

# "the passage of Article 50" is that of a law
_WORK = (
    r"(?:(?:the|this|an?|above|given|provided) )*(?:text|article|document|book|story|novel|report|"
    r"paper|chapter|section|poem|essay|Bible)\b(?! (?:\d|(?-i:[IVXLC]+\b)))"
)

_ANOTHER_SENSE = (
    r"(?! (?:through|to|between|into|across|around|under|over|past)\b| from (?:\S+ ){1,4}?to\b|"
    rf" of (?!{_WORK}))"
)
"""What follows "the passage" of a law, of time or of a ship is not this."""

_PATTERNS = {
    "English": (
        rf"\bthe passage\b{_ANOTHER_SENSE}",
        # no law, time or ship follows these, whatever the passage is of
        r"\baccording to the passage\b",
        r"\b(?:what|how) does the passage\b.* (?:say|state|mention|describe|explain|suggest)\b",
        r"\b(?:this|(?:the|this) (?:above|given|provided)) passage\b",
        r"\b(?:the|this) (?:(?:above|given|provided) )?(?:excerpt|snippet)\b",
        # "the author of Dracula" is a person
        r"\b(?:according to|in|from|by|of|does) (?:the|this) (?:(?:above|given|provided) )?"
        r"author\b(?! of\b)",
        # "the colour of the text in CSS" is about any text
        r"\baccording to (?:the|this) (?:(?:above|given|provided) )?(?:text|document)\b",
        r"\b(?:in|from|by|of|does) (?:this|(?:the|this) (?:above|given|provided)) "
        r"(?:text|document)\b",
        r"\b(?:in|from|by|of) the (?:text|document)(?=\W*$|,)",
        r"\bdoes the (?:text|document) (?:say|state|mention|describe|explain|discuss|suggest)\b",
        r"\b(?:said|stated|mentioned|described|explained|discussed|given) (?:in|by) the "
        r"(?:text|document)\b",
        r"\bas (?:mentioned|described|stated) (?:above|in the "
        r"(?:text|document|article|paragraph|section|context|report|paper|study|abstract|"
        r"introduction|table|figure|chapter|example))\b",
        r"\b(?:this|(?:the|this) (?:above|given|provided|following)) "
        r"(?:article|paragraph|section|context)\b",
        r"\b(?:is|are|was|were) mentioned(?: about|\W*$)",
        # "the information that is provided on a form" is asked for
        r"\binformation (?:is|was) (?:provided|given)"
        r"(?: (?:about|regarding|concerning)\b| (?:in|by) the (?:table|section)\b|\W*$)",
    ),
    "German": (
        r"\b(?:laut|gemäß|in) (?:dem|der|diesem|dieser) (?:text|abschnitt|textabschnitt)\b",
        r"\b(?:laut|gemäß) der passage\b|\b(?:laut|gemäß|in) dieser passage\b",
        # "in der Passage durch das Eis" is a voyage
        r"\bin der passage\b"
        r"(?! (?:durch|nach|von|zwischen)\b| des (?!textes|buch|romans|artikels))",
        r"\b(?:im|laut) (?:text|abschnitt|textabschnitt)\b",
    ),
    "French": (
        r"\b(?:selon|d['’]après|dans) (?:le|ce) texte\b",
        r"\b(?:selon|d['’]après) le passage\b|\b(?:selon|d['’]après|dans) ce passage\b",
        # "dans le passage du Nord-Ouest" is a strait
        r"\bdans le passage\b(?! (?:de|du|des|à|au|entre|vers)\b| d['’])",
        r"\b(?:selon|d['’]après|dans) (?:l['’]|cet )extrait\b",
    ),
    "Spanish": (r"\b(?:según|en) (?:el|este) (?:texto|pasaje|fragmento)\b",),
    "Italian": (
        # "nel passaggio da X a Y" is a transition
        r"\b(?:nel|dal|secondo il|in questo) (?:testo|brano)\b",
        r"\bsecondo il passaggio\b",
    ),
    "Portuguese": (
        # "no trecho entre X e Y" is a stretch of road
        r"\b(?:no|neste|nesse) texto\b",
        r"\b(?:segundo|conforme|de acordo com) (?:o|este|esse) (?:texto|trecho)\b",
        r"\b(?:segundo|conforme|de acordo com) a passagem\b",
    ),
    "Dutch": (
        r"\b(?:volgens|in|uit) (?:de|deze) tekst\b",
        r"\bvolgens de passage\b|\b(?:volgens|in|uit) deze passage\b",
        r"\b(?:in|uit) de passage\b(?! (?:door|naar|van|tussen)\b)",
        r"\b(?:volgens|in|uit) (?:het|dit) (?:fragment|tekstfragment)\b",
    ),
    "Swedish": (r"\b(?:enligt|i) (?:den här )?texten\b",),
    "Danish, Norwegian": (r"\b(?:ifølge|i) teksten\b",),
    "Polish": (
        r"\b(?:według|zgodnie z) (?:tekstu|tekstem|fragmentu|fragmentem)\b",
        r"\bw (?:tym )?tekście\b",
    ),
    "Czech": (r"\b(?:podle|v) (?:tohoto |tomto )?textu\b",),
    "Russian": (
        r"\b(?:согласно|судя по) (?:этому |данному )?(?:тексту|отрывку)\b",
        r"\bв (?:этом |данном |привед[её]нном )?(?:тексте|отрывке)\b",
        r"\bиз (?:этого |данного )?(?:текста|отрывка)\b",
    ),
    "Ukrainian": (r"\bзгідно з (?:цим )?текстом\b", r"\b[ву] (?:цьому )?тексті\b"),
    "Greek": (r"\bσύμφωνα με το κείμενο\b", r"\bστο κείμενο\b"),
    "Turkish": (
        r"\b(?:metne|pasaja|paragrafa) göre\b",
        r"\bmetinde\b",
        r"\byukarıdaki (?:metin|paragraf|pasaj)",
    ),
    "Indonesian": (r"\b(?:menurut|berdasarkan|dalam) (?:teks|bacaan)\b",),
    "Vietnamese": (
        r"\btheo (?:đoạn văn|đoạn trích|bài viết|văn bản(?! số))\b",
        r"\btrong (?:đoạn văn|đoạn trích|bài viết)\b",
        r"\b(?:đoạn văn|văn bản) (?:này|trên)\b",
    ),
    "Arabic": (
        # "في الفقرة 3" is a paragraph of a law
        r"(?:وفق|طبق)[\u064b\u0627]* (?:لل|لهذا ال)(?:نص|مقطع)\b",
        r"\b(?:بحسب|حسب|في|من) (?:هذا )?(?:النص|المقطع)\b",
        r"\bهذه الفقرة\b",
    ),
    "Persian": (r"\b(?:بر اساس|طبق|در) (?:این )?متن\b",),
    "Hebrew": (r"\b(?:לפי|על פי) (?:הטקסט|הקטע)\b", r"\bבטקסט\b", r"\bבקטע הזה\b"),
    "Hindi": (
        r"गद्यांश",
        r"(?:इस|दिए गए|उपरोक्त) (?:पाठ|अनुच्छेद|लेख)",
        r"पाठ के अनुसार",
    ),
    "Tamil": (r"(?:பத்தியின்|உரையின்)படி", r"இந்தப் பத்தி"),
    "Thai": (
        # "ข้อความ" alone is a message too
        r"ตาม(?:ข้อความ|บทความ|เนื้อเรื่อง)",
        r"(?:ข้อความ|บทความ|ย่อหน้า|เนื้อหา)(?:นี้|ข้างต้น|ดังกล่าว)",
    ),
    "Chinese": (
        r"根[据據](?:上述|以上|本|[该該]|[这這]段|[这這]篇|此|所[给給]|[给給]定的?|提供的?)"
        r"(?:文本|文章|段落|短文|文段|文字|材料|[内內]容)",
        r"根[据據](?:文章|短文|段落|文段|原文|上文|文本)(?:[内內]容|所述)?(?=[，,、：:])",
        r"(?:[这這]段|[这這]篇|上述|[该該])(?:文章|文字|文本|短文|段落|文段)",
        r"(?:文章|短文|段落|文段)[中里裡](?:提到|提及|描述|指出|介[绍紹])",
        # not in 中文中, 论文中, 条文中
        r"(?:^|[在据據，,、\s])文中(?:提到|提及|描述|指出|介[绍紹]|的)",
    ),
    "Japanese": (
        r"(?:この|上記の|次の)(?:文章|本文|テキスト|段落|一節)(?=[にでのはから])",
        r"(?:文章|テキスト|(?<![日基])本文)(?:によると|によれば|に書かれ|で述べ|の中で|中で)",
    ),
    "Korean": (
        # "지문" alone is a fingerprint too
        r"(?<!\w)(?:이|위|다음|주어진) ?(?:글|지문|본문|텍스트|단락|문단)(?=에|은|의|을)",
        r"(?<!\w)(?:글|지문|본문|텍스트)에 (?:따르면|의하면)",
        r"(?<!\w)본문에서",
    ),
}
"""Language -> what speaks of the passage in it. Other meanings of the words are left alone."""

_PATTERN = regex.compile(
    "|".join(pattern for patterns in _PATTERNS.values() for pattern in patterns), regex.IGNORECASE
)


def refers_to_passage(text: str) -> bool:
    """Whether a query speaks of "the passage" or "the text", in any language of the table."""
    return _PATTERN.search(unicodedata.normalize("NFC", text)) is not None
