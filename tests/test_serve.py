"""The page of ``refine-fast serve`` and its JSON endpoint, with hostile documents and queries."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from refine_fast import files
from refine_fast.cli import main
from refine_fast.errors import RefineFastWarning
from refine_fast.pipeline.commands.search import open_searcher
from refine_fast.pipeline.commands.serve import LOCAL_HOSTS, TOKEN_VARIABLE, is_loopback
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import read_records
from refine_fast.pipeline.corpus.text import whole_characters
from refine_fast.pipeline.queries.user import load_queries
from refine_fast.pipeline.serving import judged as judged_module
from refine_fast.pipeline.serving.judged import JUDGED, Judged

uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn: pip install '.[serve]'")
pytest.importorskip("starlette", reason="needs starlette: pip install '.[serve]'")

HOSTILE = (
    "# <img src=x onerror=hacked()> hostile\n\n"
    "The zebra crossing <script>window.hacked = 1</script> is </mark></article> here \x1b[31m now. "
    "A second \U0001f600 zebra sentence with <b>bold</b> \u202e reversed text. "
    "<a href='javascript:hacked()'>zebra</a> &lt;b&gt; \u2028 end of it."
)


@contextmanager
def serving(run: Path, **options: Any) -> Iterator[str]:
    """The address of a server in this process."""
    from refine_fast.pipeline.serving.web import application

    searcher = open_searcher(run, Console(quiet=True))
    app = application(searcher, Judged(run / JUDGED), **options)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def run(indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    out = shutil.copytree(indexed, folder / "run")
    (folder / "more").mkdir()
    (folder / "more" / "hostile.txt").write_text(HOSTILE, encoding="utf-8")
    assert main(["index", str(out), "--add", str(folder / "more"), "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    with serving(run, hosts=["127.0.0.1"]) as found:
        yield found


def call(
    url: str, body: object = None, *, kind: str = "application/json", **headers: str
) -> tuple[int, Any]:
    """Status and JSON value of a response."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": kind, **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text


def test_the_endpoint_answers_as_search_does(address: str, run: Path, capsys) -> None:
    query = "how are operators called"
    status, found = call(f"{address}/api/search", {"query": query, "k": 3})
    assert status == 200
    url = f"{address}/api/search?q=how+are+operators+called&k=3"
    assert call(url) == (200, found)
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as response:
        assert response.status == 200
    for kind in ("Application/JSON", "application/json; charset=utf-8"):
        assert call(f"{address}/api/search", {"query": query, "k": 3}, kind=kind) == (200, found)
    assert main(["search", str(run), query, "-k", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["systems"] == found["systems"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": " "}, "query must be a text that is not empty"),
        ({"query": 5}, "query must be a text that is not empty"),
        ({"query": "x", "k": 0}, "k must be an integer from 1 to 100 (got '0')"),
        ({"query": "x", "k": "9" * 5000}, "k must be an integer from 1 to 100"),
        ({"query": "x" * 10_001}, "query must have at most 10,000 characters (got 10,001)"),
        (b"{" * 100, "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * 300_000, "a request may have at most 200,000 bytes"),
        ([1], "must be a JSON object"),
    ],
)
def test_what_cannot_be_answered_is_refused(address: str, body: object, message: str) -> None:
    status, value = call(f"{address}/api/search", body)
    assert status == 400
    assert message in value["error"]


def test_another_site_cannot_use_it(address: str) -> None:
    """A form of another page, and a name that resolves to this machine."""
    mark = {"query": "x", "doc_id": "y"}
    assert call(f"{address}/api/judge", mark, kind="text/plain")[0] == 400
    assert call(f"{address}/api/about", Host="evil.example")[0] == 400
    with urllib.request.urlopen(address) as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_every_name_of_this_machine_is_answered(run: Path) -> None:
    """An address of IPv6 too, which some versions of starlette cut at its first colon."""
    with serving(run, hosts=[*LOCAL_HOSTS]) as address:
        for host in ("127.0.0.1:8765", "localhost", "[::1]", "[::1]:8765"):
            assert call(f"{address}/api/about", Host=host)[0] == 200
        for host in ("evil.example:8765", "[evil.example"):
            assert call(f"{address}/api/about", Host=host)[0] == 400


def test_a_token(run: Path) -> None:
    with serving(run, token="secret") as address:
        assert call(f"{address}/api/about")[0] == 401
        assert call(f"{address}/api/about", Cookie="refine_fast_token=other")[0] == 401
        assert call(f"{address}/?token=other")[0] == 401
        assert call(f"{address}/page.js")[0] == 401
        assert call(f"{address}/api/about", Authorization="Bearer secret")[0] == 200
        assert call(f"{address}/api/about", Cookie="refine_fast_token=secret")[0] == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local
    assert not is_loopback("example.org")


LONG = ("zebra <script>alert(1)</script> \x00\x07\u202e" * 400)[:10_000]
ODD = [LONG, "\ud800 zebra", "\x00", "'\"><svg onload=hacked()>", "😀" * 5000, "OR 1=1 --", "🦓"]


def test_twenty_users_with_odd_queries_lose_nothing(address: str, run: Path) -> None:
    """Searches and marks at once: every answer is its own query's, every mark is on the disk."""
    target = read_records(run / "chunks.jsonl", Chunk)[3].id

    def user(number: int) -> None:
        for query in (f"user {number} asks for operators", ODD[number % len(ODD)]):
            status, found = call(f"{address}/api/search", {"query": query, "k": 5})
            assert status == 200
            assert found["query"] == whole_characters(query)
            assert len(found["systems"]["blend"]) == 5
        mark = {"query": f"user {number} asks for operators", "doc_id": target}
        assert call(f"{address}/api/judge", mark)[0] == 200

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(user, range(20)))
    marked = [json.loads(line) for line in (run / JUDGED).open(encoding="utf-8")]
    mine = [mark for mark in marked if mark["text"].startswith("user ")]
    assert len(mine) == 20
    text = next(c.text for c in read_records(run / "chunks.jsonl", Chunk) if c.id == target)
    assert {mark["passage_sha256"] for mark in mine} == {sha256(text.encode()).hexdigest()}
    queries = load_queries(run / JUDGED, read_records(run / "chunks.jsonl", Chunk))
    assert {query.chunk_id for query in queries} == {target}

    status, left = call(f"{address}/api/judge", {**mine_of(mine[0]), "answers": False})
    assert (status, left["marks"]) == (200, len(marked) - 1)
    status, refused = call(f"{address}/api/judge", {"query": "x", "doc_id": "no such passage"})
    assert (status, refused["error"][:26]) == (400, "doc_id names no passage of")


def mine_of(mark: dict[str, str]) -> dict[str, str]:
    return {"query": mark["text"], "doc_id": mark["doc_id"]}


def test_marks_with_odd_texts_are_read_back(tmp_path: Path) -> None:
    judged = Judged(tmp_path / JUDGED)
    for number, query in enumerate(ODD):
        judged.mark(query, f"d{number}\n\x00")
    again = Judged(tmp_path / JUDGED)
    assert len(again) == len(ODD)
    assert again.of(LONG, {"d0\n\x00": "any text"}) == ["d0\n\x00"]


def test_a_mark_that_cannot_be_written_is_refused_with_the_reason(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next one is kept."""
    target = read_records(run / "chunks.jsonl", Chunk)[0].id
    out = shutil.copytree(run, tmp_path / "run")
    mark = {"query": "who writes?", "doc_id": target}

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serving(out) as address:
        marks = call(f"{address}/api/about")[1]["marks"]
        with monkeypatch.context() as patch:
            patch.setattr(files, "fsync", full)
            status, refused = call(f"{address}/api/judge", mark)
        assert (status, refused["error"]) == (
            400,
            f"{out / JUDGED} cannot be written (No space left on device); fix this and mark again.",
        )
        assert call(f"{address}/api/about")[1]["marks"] == marks
        assert call(f"{address}/api/judge", mark) == (200, {"marks": marks + 1})


def test_a_new_file_of_marks_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name too, once a mark counts."""
    synced = []
    monkeypatch.setattr(judged_module, "fsync", synced.append)
    Judged(tmp_path / JUDGED).mark("q", "a")
    assert synced == [tmp_path]


def test_a_server_goes_on_with_a_rebuilt_index(run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    with serving(out) as address:
        assert call(f"{address}/api/search", {"query": "operators"})[0] == 200
        assert main(["index", str(out), "--type", "hnsw", "--quiet"]) == 0
        assert main(["index", str(out), "--remove", "hostile.txt", "--quiet"]) == 0
        status, found = call(f"{address}/api/search", {"query": "zebra crossing"})
        assert status == 200
        assert "hostile" not in json.dumps(found["systems"])
        shutil.copy(out / "tuned" / "model.safetensors", out / "model" / "model.safetensors")
        assert main(["index", str(out), "--quiet"]) == 0
        status, refused = call(f"{address}/api/search", {"query": "zebra crossing"})
        assert (status, refused["error"]) == (
            400,
            f"{out}: the index was rebuilt (the product encoder changed); start the command again.",
        )


def test_two_servers_of_one_run_lose_no_mark(tmp_path: Path) -> None:
    one, other = Judged(tmp_path / JUDGED), Judged(tmp_path / JUDGED)
    assert one.mark("first", "a") == 1
    assert other.mark("second", "b") == 2
    assert one.mark("first", "a", answers=False) == 1
    assert Judged(tmp_path / JUDGED).marks == [("second", "b")]


def test_a_mark_counts_for_the_passage_that_was_marked(tmp_path: Path) -> None:
    """Not for another one that got its id; a mark without a digest counts as ever."""
    path = tmp_path / JUDGED
    path.write_text(json.dumps({"text": "old", "doc_id": "a"}) + "\n")
    judged = Judged(path)
    judged.mark("q", "a", "the text of a \ud800")  # as the index has it: whole
    judged.mark("q", "b", "the text of b")
    judged.mark("q", "gone", "another text")
    texts = {"a": "the text of a \ufffd", "b": "an edited text", "c": "x"}
    for marks in (judged, Judged(path)):
        assert marks.matching(lambda ids: texts) == ([("old", "a"), ("q", "a")], 2)
        assert marks.of("q", texts) == ["a"]
        assert marks.of("old", texts) == ["a"]
        assert marks.of("q", {"b": "the text of b"}) == ["b"]
    chunks = [Chunk(id, text, "", id, 0, len(text)) for id, text in texts.items()]
    with pytest.warns(RefineFastWarning, match="1 of 4 queries are skipped"):
        queries = load_queries(path, chunks)
    assert [(query.text, query.chunk_id) for query in queries] == [
        ("old", "a"),
        ("q", "a"),
        ("q", "b"),
    ]
    assert judged.mark("q", "b", answers=False) == 3


def test_marks_choose_the_blend(indexed: Path, tmp_path: Path, capsys) -> None:
    """Enough of them, and they alone do; else they are added to the held-out queries."""
    out = shutil.copytree(indexed, tmp_path / "run")
    chunks = read_records(out / "chunks.jsonl", Chunk)
    judged = Judged(out / JUDGED)

    def chosen_by() -> dict[str, Any]:
        before = json.loads((out / "index" / "index.json").read_text())
        assert main(["index", str(out), "--json", "--quiet"]) == 0
        blend = json.loads(capsys.readouterr().out)["blend"]
        after = json.loads((out / "index" / "index.json").read_text())
        assert after == {**before, "blend": blend}  # no passage is encoded again
        return blend

    before = chosen_by()
    judged.mark("a query about a passage that is gone", "nowhere")
    judged.mark("the first mark", chunks[0].id)
    assert before["queries"] > 2
    few = chosen_by()
    assert few["queries"] == before["queries"] + 1
    for number in range(60):
        judged.mark(f"{number} {chunks[number].text[:40]}", chunks[number].id)
    many = chosen_by()
    assert many["queries"] == 61
    assert chosen_by() == many

    # Nor does one of a passage that has another text by now.
    judged.mark("another text", chunks[-1].id, "what it was")
    assert chosen_by() == many

    # A passage that was removed is not one that could have been found.
    removed = chunks[0].id.partition("#")[0]
    gone = sum(chunk.id.partition("#")[0] == removed for chunk in chunks[:60])
    assert main(["index", str(out), "--remove", removed, "--quiet"]) == 0
    judged.mark("one more mark", chunks[-1].id)
    assert chosen_by()["queries"] == 61 - gone


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_serves_until_it_is_stopped(run: Path, sent: signal.Signals, code: int) -> None:
    """A client that leaves within its request is no fault of the server's, and one that never ends
    its request does not keep it from stopping."""
    process = subprocess.Popen(
        [sys.executable, "-m", "refine_fast", "serve", str(run), "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    lines = ""
    while "}" not in lines:
        lines += process.stdout.readline()
    address = json.loads(lines)["address"]
    begun = (
        b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 50\r\n\r\n{"
    )
    place = ("127.0.0.1", urlsplit(address).port)
    with socket.create_connection(place) as gone, socket.create_connection(place) as slow:
        for client in (gone, slow):
            client.sendall(begun)
        gone.close()
        assert call(f"{address}api/about")[0] == 200
        process.send_signal(sent)
        assert process.wait(60) == code
    assert "Traceback" not in (told := process.stderr.read())
    assert told.endswith("stopped; the marks are saved.\n")


def test_a_token_that_was_made_is_shown_even_if_quiet(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: None)
    for given in ("", "a secret"):  # an empty variable gives none
        monkeypatch.setenv(TOKEN_VARIABLE, given)
        assert main(["serve", str(run), "--host", "0.0.0.0", "--port", "0", "--quiet"]) == 0
        assert ("?token=" in capsys.readouterr().err) == (not given)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip(
        "playwright.sync_api", reason="needs playwright: pip install playwright"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A page whose errors and policy violations fail the test."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.goto(address)
    yield page
    assert [text for text in problems if "ERR_FAILED" not in text] == []
    page.close()


def shot(page: Any, name: str) -> None:
    """A screenshot, where REFINE_FAST_SHOTS names a folder for them."""
    if folder := os.environ.get("REFINE_FAST_SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def test_a_person_searches_and_marks_with_the_keyboard(page: Any, run: Path) -> None:
    page.keyboard.type("zebra <script>window.hacked = 1</script> crossing")
    page.keyboard.press("Enter")
    page.wait_for_selector("article")
    systems = page.eval_on_selector_all("section", "x => x.map(s => s.dataset.system)")
    assert systems == ["blend", "fused", "base", "BM25"]
    first = page.locator('section[data-system="BM25"] article').first
    assert "<script>window.hacked = 1</script>" in first.inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.locator("main script, main img, main a, main b").count() == 0
    marked = first.locator("mark").inner_text()
    assert marked
    assert marked in HOSTILE
    target = first.get_attribute("data-id")
    assert target.startswith("hostile.txt")

    page.keyboard.press("ArrowDown")  # from the query to the first passage
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("a")
    page.wait_for_selector("article.answers")
    assert page.locator(f'article[data-id="{target}"].answers').count() >= 1
    marks = [json.loads(line) for line in (run / JUDGED).open(encoding="utf-8")]
    query = "zebra <script>window.hacked = 1</script> crossing"
    assert {"query": query, "doc_id": target} in map(mine_of, marks)
    shot(page, "wide")
    page.keyboard.press("a")
    page.wait_for_selector("article.answers", state="detached")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"


def test_a_telephone_shows_one_system_at_a_time(page: Any) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.fill("#query", "x" * 300 + " zebra " + LONG[:9000])
    page.click("form button")
    page.wait_for_selector("article")
    assert page.locator("section:visible").count() == 1
    page.click('#tabs button[data-system="BM25"]')
    assert page.locator("section:visible").get_attribute("data-system") == "BM25"
    shot(page, "telephone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.eval_on_selector_all(
        "button", "x => x.filter(b => b.offsetParent && b.offsetHeight < 40).length"
    )
    assert small == 0


def test_a_server_that_is_gone_is_named(page: Any) -> None:
    page.route("**/api/search", lambda route: route.abort())
    page.fill("#query", "zebra")
    page.click("form button")
    page.get_by_text("the server does not answer").wait_for()
    page.unroute("**/api/search")
