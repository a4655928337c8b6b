"""What the filters make of good and bad queries, language by language."""
# ruff: noqa: E501 - tables of texts

import pytest

from refine_fast.pipeline.queries.llm import filters
from refine_fast.pipeline.queries.llm.languages import is_question
from refine_fast.pipeline.queries.llm.passage_reference import refers_to_passage
from refine_fast.pipeline.queries.llm.reply_parser import no_query

# language -> (passage, question with a mark, question without one, keywords, statement)
LANGUAGES = {
    "Chinese": (
        "粮仓的通风口每三小时打开一次，湿度超过百分之七十时由值班员手动关闭。温度计挂在北墙上，每周校准一次。",
        "粮仓的通风口多久打开一次？",
        "湿度多高时要关闭通风口",
        "粮仓 湿度 通风",
        "值班员负责粮仓里的温度计。",
    ),
    "Japanese": (
        "穀物倉庫の換気口は三時間ごとに開きます。湿度が七十パーセントを超えると、当番が手で閉めます。温度計は北の壁にあり、毎週校正されます。",
        "換気口の開く間隔は？",
        "湿度が高いとき、だれが換気口を閉めますか",
        "倉庫 換気 湿度",
        "温度計は当番のものです。",
    ),
    "Korean": (
        "곡물 창고의 환기구는 세 시간마다 열립니다. 습도가 칠십 퍼센트를 넘으면 당직자가 손으로 닫습니다. 온도계는 북쪽 벽에 있습니다.",
        "환기구는 몇 시간마다 열리나요?",
        "습도가 높으면 누가 환기구를 닫습니까",
        "창고 환기구 습도",
        "당직자가 온도계를 관리합니다.",
    ),
    "Thai": (
        "ช่องระบายอากาศของยุ้งฉางเปิดทุกสามชั่วโมง เมื่อความชื้นเกินเจ็ดสิบเปอร์เซ็นต์ เจ้าหน้าที่เวรจะปิดด้วยมือ เทอร์โมมิเตอร์อยู่ที่ผนังด้านเหนือ",
        "ใครปิดช่องระบายอากาศ?",
        "ช่องลมของยุ้งเปิดบ่อยแค่ไหน",
        "ยุ้งฉาง ความชื้น",
        "เจ้าหน้าที่ดูแลเทอร์โมมิเตอร์",
    ),
    "Khmer": (
        "រន្ធខ្យល់នៃជង្រុកបើករៀងរាល់បីម៉ោង។ ពេលសំណើមលើសចិតសិបភាគរយ អ្នកយាមបិទវាដោយដៃ។ ទែម៉ូម៉ែត្រនៅលើជញ្ជាំងខាងជើង។",
        "តើរន្ធខ្យល់បើកញឹកញាប់ប៉ុនណា?",
        "អ្នកណាបិទរន្ធខ្យល់ពេលសើម",
        "ជង្រុក សំណើម",
        "ឧបករណ៍នេះជារបស់អ្នកយាម។",
    ),
    "Burmese": (
        "စပါးကျီ၏ လေဝင်ပေါက်ကို သုံးနာရီတိုင်း ဖွင့်သည်။ စိုထိုင်းဆ ခုနစ်ဆယ်ရာခိုင်နှုန်းကျော်လျှင် တာဝန်ကျသူက လက်ဖြင့် ပိတ်သည်။",
        "လေဝင်ပေါက်ကို ဘယ်သူပိတ်သလဲ?",
        "စပါးကျီကို ဘယ်အချိန် ဖွင့်သလဲ",
        "စပါးကျီ စိုထိုင်းဆ",
        "တာဝန်ကျသူသည် အိမ်သို့ပြန်သည်။",
    ),
    "Lao": (
        "ຊ່ອງລົມຂອງສາງເຂົ້າເປີດທຸກສາມຊົ່ວໂມງ. ເມື່ອຄວາມຊຸ່ມເກີນເຈັດສິບສ່ວນຮ້ອຍ ຜູ້ຢູ່ເວນປິດດ້ວຍມື.",
        "ຜູ້ໃດປິດຊ່ອງລົມ?",
        "ຊ່ອງລົມເປີດທຸກຈັກຊົ່ວໂມງ",
        "ສາງເຂົ້າ ຄວາມຊຸ່ມ",
        "ຜູ້ຢູ່ເວນກັບເຮືອນ.",
    ),
    "Hindi": (
        "अनाज गोदाम के रोशनदान हर तीन घंटे में खुलते हैं। नमी सत्तर प्रतिशत से अधिक होने पर पहरेदार उन्हें हाथ से बंद करता है।",
        "रोशनदान कितने घंटों में खुलते हैं?",
        "अधिक नमी में रोशनदान कौन बंद करता है",
        "गोदाम नमी रोशनदान",
        "पहरेदार रात में घर जाता है।",
    ),
    "Tamil": (
        "தானியக் கிடங்கின் காற்றுத் துளைகள் மூன்று மணி நேரத்திற்கு ஒருமுறை திறக்கும். ஈரப்பதம் எழுபது சதவீதத்தைத் தாண்டினால் காவலர் கையால் மூடுவார்.",
        "காற்றுத் துளைகளை யார் மூடுவார்?",
        "கிடங்கின் துளைகள் எத்தனை மணிக்கு ஒருமுறை திறக்கின்றன",
        "கிடங்கு ஈரப்பதம்",
        "காவலர் இரவில் வீட்டுக்குச் செல்கிறார்.",
    ),
    "Arabic": (
        "تُفتح فتحات التهوية في مخزن الحبوب كل ثلاث ساعات. إذا تجاوزت الرطوبة سبعين في المئة يغلقها الحارس باليد. ميزان الحرارة على الجدار الشمالي.",
        "كم مرة تفتح فتحات التهوية؟",
        "من يغلق الفتحات عند ارتفاع الرطوبة",
        "رطوبة مخزن الحبوب",
        "يعود الحارس إلى بيته ليلا.",
    ),
    "Hebrew": (
        "פתחי האוורור של מחסן התבואה נפתחים כל שלוש שעות. כשהלחות עולה על שבעים אחוז השומר סוגר אותם ביד. מד החום על הקיר הצפוני.",
        "כל כמה זמן נפתחים הפתחים?",
        "מי סוגר את הפתחים כשלח",
        "לחות מחסן תבואה",
        "השומר הולך הביתה בלילה.",
    ),
    "Russian": (
        "Вентиляционные люки зернохранилища открываются каждые три часа. Если влажность превышает семьдесят процентов, дежурный закрывает их вручную.",
        "Кто закрывает люки?",
        "Как часто открываются люки зернохранилища",
        "влажность зернохранилище люки",
        "Ночью дежурный уходит домой.",
    ),
    "Turkish": (
        "Tahıl ambarının havalandırma kapakları üç saatte bir açılır. Nem yüzde yetmişi aşarsa nöbetçi onları elle kapatır. Termometre kuzey duvarındadır.",
        "Kapakları kim kapatır?",
        "Ambarın kapakları ne sıklıkla açılır",
        "tahıl ambarı nem",
        "Nöbetçi gece evine döner.",
    ),
    "Vietnamese": (
        "Cửa thông gió của kho thóc mở ba giờ một lần. Khi độ ẩm vượt bảy mươi phần trăm, người trực đóng chúng bằng tay. Nhiệt kế treo trên tường phía bắc.",
        "Ai đóng cửa thông gió?",
        "Cửa thông gió của kho mở bao lâu một lần",
        "độ ẩm kho thóc",
        "Người trực về nhà vào ban đêm.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_good_queries_are_kept(language: str) -> None:
    passage, marked, bare, keywords, _ = LANGUAGES[language]
    assert filters.check(marked, passage, "question") is None
    assert filters.check(bare, passage, "question") is None
    assert filters.check(keywords, passage, "keywords") is None


@pytest.mark.parametrize("language", LANGUAGES)
def test_bad_queries_are_dropped(language: str) -> None:
    passage, marked, _, _, statement = LANGUAGES[language]
    assert filters.check(statement, passage, "question") == "not a question"
    whole = passage.split("。")[0].split("।")[0]
    assert filters.check(whole, passage, "claim") in ("copy of the passage", "too long")
    foreign = "Wie oft werden die Lüftungsklappen geöffnet?"
    assert filters.check(foreign, passage, "question") == "wrong language"
    assert filters.check(marked[0], passage, "question") in ("too short", "empty")


@pytest.mark.parametrize("language", ["Arabic", "Hebrew"])
@pytest.mark.parametrize("end", ["؟\u200f", "?\u200f", "\u061c؟\u202c"])
def test_a_mark_of_direction_may_follow_the_question_mark(language: str, end: str) -> None:
    passage, _, _, _, statement = LANGUAGES[language]
    assert filters.check(statement[:-1] + end, passage, "question") is None


def test_a_language_without_a_list_gets_the_benefit_of_the_doubt() -> None:
    georgian = "მარცვლის საწყობის სავენტილაციო სარკმლები ყოველ სამ საათში იღება."
    assert is_question("როდის იღება სარკმლები", georgian) is None
    assert filters.check("როდის იღება სარკმლები", georgian, "question") is None


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Ogni quanto si cambiano le chiavi", True),
        ("Le chiavi vecchie restano valide", False),
        ("Von wem werden die Schlüssel gewechselt", True),
        ("¿Cuándo se cambian las llaves", True),
        ("Name the keeper of the keys", True),
        ("The keeper changes the keys", False),
    ],
)
def test_questions_without_a_mark(text: str, question: bool) -> None:
    passages = {
        "Ogni": "Le chiavi di firma vengono cambiate ogni novanta giorni dalla squadra operativa.",
        "Le": "Le chiavi di firma vengono cambiate ogni novanta giorni dalla squadra operativa.",
        "Von": "Die Signaturschlüssel werden alle neunzig Tage vom Betriebsteam gewechselt.",
        "¿Cuándo": "Las llaves de firma se cambian cada noventa días por el equipo de operaciones.",
    }
    english = "The signing keys are changed every ninety days by the keeper and his team."
    assert is_question(text, passages.get(text.split()[0], english)) is question


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I can't connect to the VPN, what should I do?", None),
        ("I cannot update to version 2.1, why?", None),
        ("I can't write questions about it. What else may I do?", "refusal"),
        ("I cannot help with that", "refusal"),
        ("I have forgotten my portal password, how do I reset it?", None),
        ("I have written two questions. Do they suit you?", "preamble"),
        ("I will now list two questions", "preamble"),
        ("claroscuro en la pintura barroca", None),
        ("Claro, aquí tienes dos preguntas", "preamble"),
        ("Claro que sí", "preamble"),
        ("voici deux questions", "preamble"),
        ("Aquí tienes dos preguntas", "preamble"),
    ],
)
def test_what_only_begins_like_a_refusal_or_a_preamble_is_a_query(
    text: str, reason: str | None
) -> None:
    assert no_query(text) == reason


# language -> (queries that speak of the passage, queries with its words in another meaning)
ABOUT_THE_PASSAGE = {
    "English": (
        [
            "According to the passage, who built it?",
            "What year is mentioned?",
            "According to the text, who built it?",
            "In the text, who built it?",
            "What is the purpose of the document?",
            "What does the document say about the crane?",
            "Who is described in the text as a builder?",
            "Who built the tower in this document of the city?",
            "What is the passage about?",
            "Who wrote the passage of the book?",
            "Who crossed the ice in this passage through the north?",
            "What does the author of the passage want?",
            "What does the author want?",
            "What is told, as described in the text?",
            "What information is provided about the crane?",
            "What does the passage of the Bible say?",
            "How does the passage to the reader describe the hero?",
            "What is the tone of the passage of the novel?",
            "What is meant in the passage of the report on costs?",
            "Who speaks in the passage of an article?",
            "According to the passage between the two speakers, who lied?",
            "As mentioned in the report, who built it?",
            "What information is provided by the table?",
        ],
        [
            "When was the text message invented?",
            "Which passage links the two rivers?",
            "How do I set the language of the document in Word?",
            "How do I change the colour of the text in CSS?",
            "What is the passage of the Stamp Act?",
            "Who voted for the passage of Section 230?",
            "What followed the passage of Article IV?",
            "When was the passage through the canal opened?",
            "How long is the passage from Dover to Calais?",
            "Who gained from the passage of time?",
            "Which other novels were written by the author of Dracula?",
            "What does the ark look like as described in the Book of Exodus?",
            "What information is provided on a customs form?",
            "What does the passage of time do to wine?",
            "What does the passage through the canal cost?",
            "Who voted for the passage of the bill on reports?",
        ],
    ),
    "German": (
        [
            "Wer baute laut dem Text den Turm?",
            "Was steht im Abschnitt über den Kran?",
            "Was geschieht laut der Passage des Romans?",
            "Wer spricht in der Passage des Textes?",
            "Was ist in dieser Passage von Kant gemeint?",
        ],
        [
            "Wie viele Läden gibt es in der Passage des Bahnhofs?",
            "Welcher Text steht auf dem Turm?",
            "Wann wurde der Abschnitt der Autobahn gebaut?",
            "Welches Schiff sank in der Passage durch das Eis?",
        ],
    ),
    "French": (
        [
            "Selon le texte, qui a construit la tour ?",
            "Que dit l'auteur dans cet extrait ?",
            "Que dit-on selon le passage de l'article ?",
            "De qui parle-t-on dans ce passage de la Bible ?",
        ],
        [
            "Quel texte est gravé sur la tour ?",
            "Où se trouve le passage souterrain ?",
            "Quels navires ont hiverné dans le passage du Nord-Ouest ?",
        ],
    ),
    "Spanish": (
        ["Según el texto, ¿quién construyó la torre?", "¿Qué se explica en este fragmento?"],
        ["¿Qué texto aparece en la torre?", "¿Cuánto mide el pasaje subterráneo?"],
    ),
    "Italian": (
        ["Secondo il testo, chi ha costruito la torre?", "Di che cosa si parla nel brano?"],
        ["Quale testo è inciso sulla torre?", "Che cosa cambia nel passaggio da gas a liquido?"],
    ),
    "Portuguese": (
        ["De acordo com o texto, quem construiu a torre?", "O que é descrito no texto?"],
        ["Que texto está gravado na torre?", "Quanto tempo leva no trecho entre Lisboa e Faro?"],
    ),
    "Dutch": (
        [
            "Wie bouwde volgens de tekst de toren?",
            "Wat wordt in deze passage beschreven?",
            "Wie spreekt volgens de passage van de tekst?",
            "Wat staat er in deze passage van het boek?",
        ],
        [
            "Welke tekst staat op de toren?",
            "Hoe lang is de passage onder het spoor?",
            "Welk schip zonk in de passage door het ijs?",
        ],
    ),
    "Swedish": (
        ["Vem byggde tornet enligt texten?", "Vad beskrivs i den här texten?"],
        ["Vilken text finns på tornet?", "Hur skickar man ett textmeddelande?"],
    ),
    "Danish": (
        ["Hvem byggede tårnet ifølge teksten?", "Hvad beskrives i teksten?"],
        ["Hvilken tekst findes på tårnet?", "Hvordan sender man en tekstbesked?"],
    ),
    "Polish": (
        ["Kto według tekstu zbudował wieżę?", "Co opisano w tym tekście?"],
        ["Jaki tekst widnieje na wieży?", "Jak wysłać wiadomość tekstową?"],
    ),
    "Czech": (
        ["Kdo podle textu postavil věž?", "Co se popisuje v tomto textu?"],
        ["Jaký text je na věži?", "Jak se posílá textová zpráva?"],
    ),
    "Russian": (
        ["Кто, согласно тексту, построил башню?", "О чём говорится в данном отрывке?"],
        ["Какой текст написан на башне?", "Как отправить текстовое сообщение?"],
    ),
    "Ukrainian": (
        ["Хто, згідно з текстом, збудував вежу?", "Що описано в цьому тексті?"],
        ["Який текст написано на вежі?", "Як надіслати текстове повідомлення?"],
    ),
    "Greek": (
        ["Σύμφωνα με το κείμενο, ποιος έχτισε τον πύργο;", "Τι αναφέρεται στο κείμενο;"],
        ["Ποιο κείμενο είναι χαραγμένο στον πύργο;"],
    ),
    "Turkish": (
        ["Metne göre kuleyi kim yaptı?", "Bu metinde ne anlatılıyor?"],
        ["Kulede hangi metin yazıyor?", "Kısa mesaj metni nasıl değiştirilir?"],
    ),
    "Indonesian": (
        ["Menurut teks, siapa yang membangun menara itu?", "Apa yang dijelaskan dalam bacaan?"],
        ["Teks apa yang tertulis di menara?", "Berapa lama membaca buku itu?"],
    ),
    "Vietnamese": (
        ["Theo đoạn văn, ai đã xây tháp?", "Văn bản trên nói về điều gì?"],
        ["Theo văn bản số 12, thuế là bao nhiêu?", "Dòng chữ nào khắc trên tháp?"],
    ),
    "Arabic": (
        ["وفقًا للنص، من بنى البرج؟", "وفقاً للنص من بنى البرج؟", "ماذا ورد في هذه الفقرة؟"],
        ["ما النص المكتوب على البرج؟", "ماذا ورد في الفقرة 3 من القانون؟"],
    ),
    "Persian": (
        ["بر اساس متن، چه کسی برج را ساخت؟", "در این متن چه گفته شده است؟"],
        ["چه متنی روی برج نوشته شده است؟"],
    ),
    "Hebrew": (
        ["לפי הטקסט, מי בנה את המגדל?", "מה נאמר בקטע הזה?"],
        ["איזה טקסט חרוט על המגדל?"],
    ),
    "Hindi": (
        ["गद्यांश के अनुसार मीनार किसने बनाई?", "इस पाठ में क्या बताया गया है?"],
        ["अनुच्छेद 14 क्या कहता है?", "मीनार पर कौन सा लेख लिखा है?"],
    ),
    "Tamil": (
        ["பத்தியின்படி கோபுரத்தை யார் கட்டினார்?", "இந்தப் பத்தியில் என்ன கூறப்படுகிறது?"],
        ["கோபுரத்தை யார் கட்டினார்?"],
    ),
    "Thai": (
        ["ตามข้อความ ใครเป็นผู้สร้างหอคอย?", "บทความนี้กล่าวถึงอะไร?"],
        ["ส่งข้อความถึงเจ้าหน้าที่ได้อย่างไร?", "ในข้อความสั้นมีกี่ตัวอักษร"],
    ),
    "Chinese": (
        ["根据上述文章，谁建造了这座塔？", "这段文字主要讲了什么？", "根據文章，誰建了這座塔？", "文中提到的塔有多高？"],
        ["中文中的声调有几个？", "日本文化的特点是什么？", "论文中的数据如何引用？", "根据材料的强度如何选择螺栓？"],
    ),
    "Japanese": (
        ["本文によると、塔を建てたのは誰ですか？", "この文章では何が説明されていますか？"],
        ["日本文化の特徴は何ですか？", "英文中の冠詞はどう使いますか？", "この文化はどこで生まれましたか？"],
    ),
    "Korean": (
        ["이 글에 따르면 누가 탑을 세웠습니까?", "본문에서 설명하는 것은 무엇입니까?"],
        ["지문에 남은 흔적은 어떻게 채취합니까?", "한글에서 모음은 몇 개입니까?", "이 글로벌 기업은 어디에 있습니까?"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("language", ABOUT_THE_PASSAGE)
def test_queries_that_speak_of_the_passage(language: str) -> None:
    dropped, kept = ABOUT_THE_PASSAGE[language]
    for query in dropped:
        assert filters.check(query, "", "query") == 'refers to "the passage"', query
    for query in kept:
        assert filters.check(query, "", "query") is None, query


def test_no_language_speaks_of_the_passage_in_the_queries_of_another() -> None:
    for queries in LANGUAGES.values():
        assert not any(refers_to_passage(text) for text in queries)
