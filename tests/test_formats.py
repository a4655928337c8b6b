"""File formats: what each reader keeps, and what it leaves out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from refine_fast.errors import RefineFastError, RefineFastWarning
from refine_fast.pipeline.corpus.columns import Columns
from refine_fast.pipeline.corpus.documents import Document, Reading, load_documents
from refine_fast.pipeline.corpus.formats.content import Unreadable
from refine_fast.pipeline.corpus.formats.files import read_file
from refine_fast.pipeline.corpus.formats.pdf import join_pages
from refine_fast.pipeline.corpus.formats.tables import read_table

pytest.importorskip("markdown_it", reason="needs the pipeline: pip install '.[pipeline]'")


def loaded(path: Path, **reading: Any) -> list[tuple[str, str, str]]:
    """(id, title, text) of the documents."""
    return [(d.id, d.title, d.text) for d in load_documents(path, reading=Reading(**reading))]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<details><summary>Who?</summary>We.</details><details>x</details>", "Who?\n\nWe.\n\nx"),
        ("<header>Shop</header><aside>Ads</aside><footer>End</footer>", "Shop\n\nAds\n\nEnd"),
        ("<figcaption>One</figcaption><figcaption>Two</figcaption>", "One\n\nTwo"),
        ("<form>a<label>b</label><select><option>c</select><p>d</p></form>", "a\n\nb\n\nd"),
        ("x<button>Reply</button><button>All</button><textarea>t</textarea>y", "x y"),
        ("<h2><button>Why so?</button></h2><div>Because.</div>", "## Why so?\n\nBecause."),
        ("<nav><a href=1>Home</a></nav><p>Text.</p>", "Text."),
        ("<nav><a href=1>Home</a><p>Text.</p>", "Home\n\nText."),
        ("<p>x</p><svg><path d=1><p>The rest.</p>", "x\n\nThe rest."),
        ("<header><nav>Home</header><main>Main</main><nav>b</nav>end", "Home\n\nMain\n\nend"),
        ("<div hidden>a</div><p style='Display: none'>b<p>c", "c"),
        ("<template><p>a</p></template><noscript>b</noscript>c<script>'<p>'</script>", "c"),
        ("<svg><title>icon</title></svg>a", "a"),
        ("<h2>Prices<a class=headerlink href='#p'>\u00b6</a></h2>x", "## Prices\n\nx"),
        ("<h2>F <a href='https://e.org/f#g'><span>#</span></a></h2>x", "## F\n\nx"),
        ("see <a href='#n1'>[1]</a> and <a href='f'>\u2192</a>", "see [1] and \u2192"),
        ("<h3>Two\n<br>lines <div>here</div></h3>x", "### Two lines here\n\nx"),
        ("<dl><dt>Pump <dd>moves water<dt>Valve<dd><p>stops it</dl>", None),
        ("<p>One<div>Two</p>Three</div><b><p>bold</b> text</p>", None),
        ("<ul><li>a<li>b<ul><li>c</ul>d</ul>", "a\n\nb\n\nc\n\nd"),
        ("<table><tr><td>a<td>b<tr><th>c<td>d</table>", "a b\n\nc d"),
        ("a&nbsp;b &lt;i&gt; caf&eacute; soft&shy;hyphen", "a b <i> caf\u00e9 softhyphen"),
        ("<pre>never closed # a\n b", "```\nnever closed # a\n b\n```"),
    ],
)
def test_html(tmp_path: Path, body: str, text: str | None) -> None:
    path = tmp_path / "a.html"
    path.write_text(f"<html><head><title>T</title></head><body>{body}</body></html>")
    content = read_file(path)
    assert content.title == "T"
    if text is None:
        text = {
            "<dl": "Pump\nmoves water\n\nValve\n\nstops it",
            "<p>": "One\n\nTwo\n\nThree\n\nbold\n\ntext",
        }[body[:3]]
    assert content.text == text


def test_html_takes_linear_time(tmp_path: Path) -> None:
    deep = (
        "<a href='#'><b>" * 20_000 + "</i></p>" * 20_000 + "</div></b>" * 20_000 + "<nav>" * 20_000
    )
    (tmp_path / "a.html").write_text(f"<p>start{deep}end")
    assert read_file(tmp_path / "a.html").text.split() == ["start", "end"]


@pytest.mark.parametrize(
    ("name", "text", "title", "body"),
    [
        ("a.md", "---\ntitle: 'Key: 1'\ntags: [a]\n---\n\nText.\n", "Key: 1", "Text.\n"),
        ("a.md", "\n---\r\nTitle: 2024-03-01\r\n...\r\n# H\r\n", "2024-03-01", "# H\r\n"),
        ("a.md", "---\ntitle: Pumps: a primer\ndraft: no\n---\nText.", "Pumps: a primer", "Text."),
        ("a.md", "---\ndate: 2024-03-01\n---\n# Heading [\u00b6](#h) {#h .c}\n", "Heading", None),
        ("a.md", '+++\ntitle = "T"\n[extra]\nx = 1\n+++\nText.', "T", "Text."),
        ("a.md", '---\ntitle: "\\ud83d\\ude80 \\ud83d"\n---\nText.', "\U0001f680 \ufffd", "Text."),
        ("a.html", "---\ntitle: T\nlayout: page\n---\n<p>Text.</p>", "T", "Text."),
        ("a_b.md", "---\n\nA rule above.\n\n---\n", "a b", "---\n\nA rule above.\n\n---\n"),
        ("a_b.md", "---\nno closing: line\n", "a b", "---\nno closing: line\n"),
    ],
)
def test_front_matter(tmp_path: Path, name: str, text: str, title: str, body: str | None) -> None:
    (tmp_path / name).write_bytes(text.encode())
    content = read_file(tmp_path / name)
    assert content.title == title
    assert content.text == ("# Heading [\u00b6](#h) {#h .c}\n" if body is None else body)


WORDS = ["pump", "valve", "seal", "cover", "belt", "gauge", "lamp", "hose"]


def test_pdf_ligatures_and_hyphenation() -> None:
    page = (
        "The o\ufb03ce \ufb01nds \ufb02ows, an un\u00ad\nbroken line of exam-\nples, the well-\n"
        "known COVID-\n19 pump; a well-known x\u00b2."
    )
    expected = (
        "The office finds flows, an unbroken line of examples, the well-known COVID-19 pump; "
        "a well-known x\u00b2."
    )
    assert join_pages([page]) == expected
    assert join_pages(["It goes on for pa-", "ges and pages."]) == "It goes on for pages and pages."


def test_pdf_running_heads() -> None:
    text = [f"The {word} is primed\nbefore use, {7 * i} times." for i, word in enumerate(WORDS)]
    heads = [f"My Book   {i}" if i % 2 else f"{i} | Chapter Two" for i in range(8)]
    numbered = [f"{h}\n{t}\n- {i} -" for i, (h, t) in enumerate(zip(heads, text, strict=True), 11)]
    assert join_pages(numbered) == "\n\n".join(text)
    assert join_pages([f"{t}\nPage {i} of 2" for i, t in enumerate(text[:2], 1)]) == "\n\n".join(
        text[:2]
    )
    # What repeats but is text stays: numbered headings, figures, a line on two pages of ten.
    kept = [f"Exercise {i}\n{t}\n{i * i}" for i, t in enumerate(text)]
    assert join_pages(kept) == "\n\n".join(kept)
    kept = ["Warning\n" + t if i in (0, 4) else t for i, t in enumerate(text)]
    assert join_pages(kept) == "\n\n".join(kept)


ENCODED = {
    "cp1252": "La rivière traverse l’été la forêt où naquit le château.",
    "cp932": "署名鍵は九十日ごとに交換されます。古い鍵は交換後一週間有効です。",
    "euc_jp": "署名鍵は九十日ごとに交換されます。古い鍵は交換後一週間有効です。",
    "gb18030": "签名密钥每九十天轮换一次，旧密钥在更换后仍有效一周。请先生成新密钥。",
    "big5": "簽名密鑰每九十天輪換一次，舊密鑰在更換後仍有效一週。",
    "cp949": "서명 키는 구십 일마다 운영 팀이 교체합니다. 이전 키는 일주일 동안 유효합니다.",
    "koi8-r": "Ключи подписи меняются каждые девяносто дней. Старый ключ действует неделю.",
    "cp1251": "Ключи подписи меняются каждые девяносто дней. Старый ключ действует неделю.",
    "cp1250": "Klucze podpisu są zmieniane co dziewięćdziesiąt dni. Stary klucz jest ważny.",
    "utf-16-le": "Ключи подписи меняются каждые девяносто дней.",
    "utf-16-be": "The keys are rotated every ninety days.",
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_encodings_are_detected_and_named(tmp_path: Path, encoding: str) -> None:
    pytest.importorskip("chardet", reason="needs pip install '.[documents]'")
    path = tmp_path / "a.txt"
    path.write_bytes(ENCODED[encoding].encode(encoding))
    with pytest.warns(
        RefineFastWarning, match=r"a.txt .* is read as .*name its encoding with --en"
    ):
        assert read_file(path).text == ENCODED[encoding]
    assert read_file(path, encoding).text == ENCODED[encoding]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(ENCODED["koi8-r"].encode(encoding))
    assert read_file(tmp_path / "a.txt").text == ENCODED["koi8-r"]


@pytest.mark.parametrize("declaration", ["<meta charset=shift_jis>", "<?xml encoding='sjis'?>"])
def test_a_declaration_tells(tmp_path: Path, declaration: str) -> None:
    (tmp_path / "a.html").write_bytes((declaration + "<p>①鍵").encode("cp932"))
    assert "鍵" in read_file(tmp_path / "a.html").text


def test_a_stray_byte_is_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Füße über ".encode() + b"\xff" + "Grüße.".encode())
    message = r"a.txt holds bytes that are not UTF-8, the first at offset 13; 1 of its characters"
    with pytest.warns(RefineFastWarning, match=message):
        assert read_file(path).text == "Füße über \ufffdGrüße."
    path.write_bytes("Füße".encode("utf-16") + b"\n")
    with pytest.warns(RefineFastWarning, match=r"not UTF-16, the first at offset 10"):
        assert read_file(path).text == "Füße\ufffd"


ROWS = [
    {"number": i, "name": f"Gate {i}", "body": f'Gate {i} opens at dawn,\nwith a "key"; {i} turns.'}
    for i in range(1, 4)
]
EXPECTED = [(ROWS[i]["name"], ROWS[i]["body"]) for i in range(3)]


def as_csv(delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


TABLES = {
    "a.csv": as_csv(","),
    "b.csv": b"\xef\xbb\xbf" + as_csv(";"),
    "named.csv": b'"sep=;"\r\n' + as_csv(";"),
    "a.tsv": as_csv("\t"),
    "list.json": json.dumps(ROWS).encode(),
    "inside.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "lines.ndjson": "\n".join(map(json.dumps, ROWS)).encode(),
    "marked.jsonl": "\n".join(map(json.dumps, ROWS)).encode("utf-16"),
    "PACKED.JSONL.GZ": gzip.compress("\n".join(map(json.dumps, ROWS)).encode("utf-16")),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TABLES[name])
    said: list[str] = []
    found = loaded(tmp_path / name, say=said.append)
    assert [(title, text) for _, title, text in found] == EXPECTED
    assert len({id for id, _, _ in found}) == 3
    assert said == [
        f"{tmp_path / name}: reads the text from column 'body', the title from column 'name'; "
        "--text-column, --title-column and --id-column choose others"
    ]
    said.clear()
    columns = Columns("name", "body", "number")
    assert [(id, t) for id, _, t in loaded(tmp_path / name, columns=columns, say=said.append)] == [
        (str(i), f"Gate {i}") for i in range(1, 4)
    ]
    assert not said
    with pytest.raises(RefineFastError, match=r"^text_column: .* has no column 'x' but only \['bo"):
        load_documents(tmp_path / name, reading=Reading(columns=Columns(text="x")))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the pipeline: pip install '.[pipeline]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert [found[1:] for found in loaded(tmp_path / "a.parquet")] == EXPECTED
    rows = [{"id": Decimal("1E3"), "words": EXPECTED[0][1].encode(), "image": b"\xff\xd8" * 99}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert loaded(tmp_path / "a.parquet") == [("1000", "", EXPECTED[0][1])]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(RefineFastError, match=r"b.parquet cannot be read: it is not a Parquet fil"):
        load_documents(tmp_path / "b.parquet")


def test_xlsx(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="needs pip install '.[documents]'")
    book = openpyxl.Workbook()
    for sheet, rows in ((book.active, ROWS[:2]), (book.create_sheet("More"), ROWS[2:])):
        sheet.append([])
        sheet.append(list(ROWS[0]))
        for row in rows:
            sheet.append(list(row.values()))
    book.save(tmp_path / "a.xlsx")
    found = loaded(tmp_path / "a.xlsx", columns=Columns(id="number"))
    assert found == [(str(i), *EXPECTED[i - 1]) for i in range(1, 4)]
    assert load_documents(tmp_path / "a.xlsx")[2].source == "a.xlsx:More:3"


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        ([{"page_content": "One.", "metadata": {}}], ["One."]),
        ([{"Text": "One."}, {"Text": "Two."}], ["One.", "Two."]),
        ([{"x": "The longest column is taken.", "y": "short"}], ["The longest column is taken."]),
    ],
)
def test_columns_are_recognized(tmp_path: Path, rows: list[Any], texts: list[str]) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [text for _, _, text in loaded(tmp_path / "a.jsonl")] == texts


def test_an_id_of_several_rows_is_no_id(tmp_path: Path) -> None:
    parts = [{"doc_id": "a", "chunk_no": i, "text": f"Part {i}."} for i in range(2)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, parts)))
    assert [id for id, _, _ in loaded(tmp_path / "a.jsonl")] == ["a.jsonl:1", "a.jsonl:2"]
    parts[1] |= {"doc_id": "b"}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*parts, parts[0]])))
    said: list[str] = []
    with pytest.warns(RefineFastWarning, match="1 documents are skipped because they repeat"):
        assert [id for id, _, _ in loaded(tmp_path / "a.jsonl", say=said.append)] == ["a", "b"]
    assert not said


def test_json_that_is_not_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"d1": {"text": "One."}, "d2": {"text": "Two."}}')
    assert loaded(tmp_path / "a.json") == [("d1", "", "One."), ("d2", "", "Two.")]
    (tmp_path / "a.json").write_text('{"title": "T", "text": "One."}')
    assert loaded(tmp_path / "a.json") == [("a.json:1", "T", "One.")]
    article = {"id": "a", "body": "A long text.", "comments": [{"user": "u", "text": "Short."}]}
    (tmp_path / "a.json").write_text(json.dumps(article))
    assert loaded(tmp_path / "a.json") == [("a", "", "A long text.")]
    (tmp_path / "a.json").write_text(json.dumps({"message": "ok"} | article | {"body": 3}))
    assert [text for _, _, text in loaded(tmp_path / "a.json")] == ["Short."]
    (tmp_path / "a.json").write_text("3")
    with pytest.raises(RefineFastError, match=r"a.json cannot be read: it holds a JSON int, not a"):
        load_documents(tmp_path / "a.json")


def test_rows_that_are_null_or_repeated(tmp_path: Path) -> None:
    rows = [{"_id": "a", "text": "One."}, {"_id": "b", "text": None}, {"_id": "a", "text": "One."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(RefineFastWarning) as caught:
        assert loaded(tmp_path / "a.jsonl") == [("a", "", "One.")]
    assert [str(warning.message).partition(",")[0] for warning in caught] == [
        "1 documents are skipped because their text is empty",
        "1 documents are skipped because they repeat an earlier row",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a,text\n1,"never closed', r"a.csv:2 is not CSV \(unexpected end of data\); close the"),
        ("a,text\n1,x,y", r"a.csv:2 has 3 cells and the header 2; put cells that hold ','"),
        ("text,text\nx,y", r"a.csv: two columns are named 'text'; rename one"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(RefineFastError, match=message):
        load_documents(tmp_path / "a.csv")


def test_tables_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,One.\n2,Two.\n")
    (tmp_path / "b.csv").write_text("id,text\n1,Three.\n2,Two.\n3,Five.\n")
    (tmp_path / "c.txt").write_text("Four.")
    (tmp_path / "queries.jsonl").write_text('{"text": "one?", "doc_id": "1"}')
    (tmp_path / "d.csv").write_text("size\n3\n")
    with pytest.warns(RefineFastWarning) as caught:
        documents = load_documents(tmp_path, reading=Reading(exclude=[tmp_path / "queries.jsonl"]))
    skipped, repeated, renamed = (str(warning.message) for warning in caught)
    assert re.search(r'd.csv is skipped: .*d.csv:2 has no field "text"', skipped)
    assert re.search("^1 documents are .* they repeat a row of another file.*b.csv:3.$", repeated)
    assert re.search('^1 documents have the id of .*b.csv:2, now "b.csv:1".$', renamed)
    assert documents == [
        Document("1", "", "One.", "a.csv:2"),
        Document("2", "", "Two.", "a.csv:3"),
        Document("b.csv:1", "", "Three.", "b.csv:2"),
        Document("3", "", "Five.", "b.csv:4"),
        Document("c.txt", "c", "Four.", "c.txt"),
    ]


def test_docx(tmp_path: Path) -> None:
    docx = pytest.importorskip("docx", reason="needs pip install '.[documents]'")
    document = docx.Document()
    document.add_heading("Pumps", 0)
    document.add_paragraph("How a pump works.")
    document.add_heading("Parts", 2)
    table = document.add_table(2, 2)
    for cell, text in zip(table._cells, ["Seal", "2 years", "Belt", "1 year"], strict=True):
        cell.text = text
    document.add_paragraph("After the table.", style="List Bullet")
    document.sections[0].header.paragraphs[0].text = "Confidential"
    document.save(tmp_path / "a.docx")
    content = read_file(tmp_path / "a.docx")
    assert content.title == "Pumps"
    assert content.text == (
        "# Pumps\n\nHow a pump works.\n\n## Parts\n\nSeal | 2 years\nBelt | 1 year\n\n"
        "After the table."
    )
    assert content.markup == "markdown"


def test_docx_with_tracked_changes_and_content_controls(tmp_path: Path) -> None:
    docx = pytest.importorskip("docx", reason="needs pip install '.[documents]'")
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls

    def w(name: str, *content: str) -> str:
        return f"<w:{name}>{''.join(content)}</w:{name}>"

    def run(text: str) -> str:
        return w("r", f"<w:t xml:space='preserve'>{text}</w:t>")

    def control(*content: str) -> str:
        return w("sdt", w("sdtContent", *content))

    sentence = w(
        "p",
        run("Wait "),
        w("del", w("r", "<w:tab/>", w("delText", "30"))),
        w("ins", run("60")),
        control(run(" minutes")),
        w("moveFrom", run("moved")),
        w("r", w("pict", w("txbxContent", w("p", run("box"))))),
    )
    controls = control(w("p", run("In a control.")), control(w("p", run("In two."))))
    cell = w("tc", w("p", w("ins", run("Seal"))), w("p", run("of rubber")))
    inner = w("tbl", w("tr", w("tc", w("p", run("inner")))))
    last = control(w("tc", inner, control(w("p", run("2 years")))))
    table = w("tbl", w("tr", cell, last), control(w("tr", w("tc", w("p", run("Belt"))))))
    document = docx.Document()
    body = w("body", sentence, controls, table).replace(">", f" {nsdecls('w')}>", 1)
    for block in list(parse_xml(body)):
        document.element.body.append(block)
    document.save(tmp_path / "a.docx")
    assert read_file(tmp_path / "a.docx").text == (
        "Wait 60 minutes\n\nIn a control.\n\nIn two.\n\nSeal of rubber | inner 2 years\nBelt"
    )


def test_pptx(tmp_path: Path) -> None:
    pptx = pytest.importorskip("pptx", reason="needs pip install '.[documents]'")
    presentation = pptx.Presentation()
    for title, text in (("Pumps", "Prime it.\nSwitch it on."), ("Valves", "Open.")):
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = text
        slide.notes_slide.notes_text_frame.text = f"Say more of {title}."
    presentation.save(tmp_path / "a.pptx")
    content = read_file(tmp_path / "a.pptx")
    assert content.title == "Pumps"
    assert content.text == (
        "# Pumps\n\nPrime it.\nSwitch it on.\n\nSay more of Pumps.\n\n"
        "# Valves\n\nOpen.\n\nSay more of Valves."
    )


@pytest.mark.parametrize(
    ("name", "module", "package", "extra"),
    [
        ("a.docx", "docx", "python-docx", "documents"),
        ("a.pptx", "pptx", "python-pptx", "documents"),
        ("a.xlsx", "openpyxl", "openpyxl", "documents"),
        ("a.pdf", "pypdf", "pypdf", "documents"),
        ("a.parquet", "pyarrow.parquet", "pyarrow", "pipeline"),
    ],
)
def test_a_missing_library_names_its_extra(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    module: str,
    package: str,
    extra: str,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    message = rf"reading \.\w+ needs {package}; pip install 'refine-fast\[{extra}\]'\.$"
    with pytest.raises(RefineFastError, match=message):
        load_documents(tmp_path / name)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_bytes(b"x")
    with pytest.raises(RefineFastError, match=r"a.doc is of a kind that is not read; give a file"):
        load_documents(tmp_path / "a.doc")


def test_cells_that_are_left_out_at_the_end_of_a_row_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("id,text,note\n1,the first text,x\n2,the second text\n")
    rows = [row for _, row in read_table(path)]
    assert rows[1] == {"id": "2", "text": "the second text", "note": ""}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_number_of_thousands_of_digits_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"text": "a", "n": ' + "9" * 5000 + "}\n")
    with pytest.raises((RefineFastError, Unreadable), match="is not JSON"):
        list(read_table(path))
