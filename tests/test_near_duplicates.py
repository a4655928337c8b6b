"""Near duplicates: one process, workers and the textbook's index mark the same texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scrambled import ScrambledWorkers

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")

from datasketch import MinHash, MinHashLSH

from refine_fast.errors import RefineFastWarning
from refine_fast.pipeline.artifacts import CHUNK_FACTS, CHUNKS, TWINS
from refine_fast.pipeline.config import RunConfig
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.context import RunContext
from refine_fast.pipeline.corpus import chunking, near_duplicates
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.dedup import deduplicate, shingles
from refine_fast.pipeline.corpus.near_duplicates import near_duplicate_mask
from refine_fast.pipeline.corpus.text import normalize
from refine_fast.pipeline.stages import chunk as chunk_stage
from refine_fast.pipeline.workers import Spread

WORDS = [f"word{i}" for i in range(500)]


def corpus(seed: int, length: int = 60) -> list[str]:
    """Pages from templates, drifting pages (each near the one before, not near the one before
    that), copies in other case, unrelated and short texts; shuffled in part."""
    draw = random.Random(seed)

    def page() -> list[str]:
        return draw.choices(WORDS, k=length)

    def changed(words: list[str], count: int) -> list[str]:
        words = list(words)
        for at in draw.sample(range(length), count):
            words[at] = f"new{draw.random()}"
        return words

    template, drifting = page(), page()
    pages = [changed(template, draw.choice([0, 1, 1, 2, 3])) for _ in range(20)]
    pages += [page() for _ in range(8)]
    draw.shuffle(pages)
    for _ in range(12):
        drifting = changed(drifting, 1)
        pages.insert(draw.randrange(len(pages)), drifting)
    texts = [" ".join(words) for words in pages] + ["a b", "c d e"]
    texts += [text.upper() for text in draw.sample(texts, 8)]
    return texts


def textbook(texts: list[str], threshold: float) -> list[bool]:
    """An index that grows in order and holds no two near duplicates."""
    index = MinHashLSH(threshold=threshold - 0.15, num_perm=128)
    marks = []
    for i, text in enumerate(texts):
        own = shingles(text)
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in own])
        others = [shingles(texts[j]) for j in index.query(sketch)]
        marks.append(any(len(own & b) / len(own | b) >= threshold for b in others))
        if not marks[-1]:
            index.insert(i, sketch)
    return marks


def by_hand(chunks: list[Chunk], remove: str, labelled: set[str]) -> tuple[list[str], Any]:
    """Ids of the chunks that are kept, and (exact, near, twins)."""
    texts = [normalize(chunk.text) for chunk in chunks]
    distinct = list(dict.fromkeys(texts))
    repeats = dict(zip(distinct, textbook(distinct, 0.8), strict=True))
    kept: dict[str, str] = {}
    ids, twins, removed = [], {}, {"exact": 0, "near": 0}
    for number, (chunk, text) in enumerate(zip(chunks, texts, strict=True)):
        if remove == "keep":
            ids.append(chunk.id)
        elif text in kept:
            removed["exact"] += 1
            if chunk.id in labelled:
                twins[chunk.id] = kept[text]
        elif remove == "exact" or not repeats[text] or chunk.id in labelled:
            ids.append(chunk.id)
            kept[text] = chunk.id
        else:
            removed["exact" if text in texts[:number] else "near"] += 1
    return ids, (removed["exact"], removed["near"], twins)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "TEXTS_PER_SHARD", 7)
    monkeypatch.setattr(chunking, "CHARACTERS_PER_SHARD", 300)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("seed", range(8))
def test_workers_mark_what_the_index_marks(seed: int, tmp_path: Path) -> None:
    texts = list(dict.fromkeys(map(normalize, corpus(seed))))
    expected = textbook(texts, 0.8)
    sets = list(map(shingles, texts))
    near_any = [
        any(len(own & b) / len(own | b) >= 0.8 for b in sets[:i]) for i, own in enumerate(sets)
    ]
    assert near_any != expected  # near a removed text, and kept: the order decides
    seen: list[tuple[int, int]] = []
    alone = near_duplicate_mask(texts, shingles, 0.8, progress=lambda *done: seen.append(done))
    assert alone.tolist() == expected
    assert seen[-1] == (len(texts), len(texts))
    workers, seen = ScrambledWorkers(seed), []
    spread = near_duplicate_mask(
        texts,
        shingles,
        0.8,
        progress=lambda *done: seen.append(done),
        spread=Spread(workers, tmp_path),
    )
    assert spread.tolist() == expected
    assert seen[-1] == (len(texts), len(texts))
    assert workers.done["sketch"] > 3
    assert workers.done["compare"] > 1


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("remove", ["near", "exact", "keep"])
@pytest.mark.parametrize("seed", range(3))
def test_workers_keep_the_same_chunks(seed: int, remove: Any, tmp_path: Path) -> None:
    texts = corpus(seed)
    chunks = [Chunk(str(i), text, "", str(i), 0, len(text)) for i, text in enumerate(texts)]
    labelled = set(random.Random(seed).sample([chunk.id for chunk in chunks], 12))
    ids, counts = by_hand(chunks, remove, labelled)
    for spread in (None, Spread(ScrambledWorkers(seed), tmp_path)):
        kept, removed = deduplicate(
            chunks, remove=remove, is_labelled=lambda chunk: chunk.id in labelled, spread=spread
        )
        assert [chunk.id for chunk in kept] == ids
        assert (removed.exact, removed.near, removed.twins) == counts


def test_texts_without_a_candidate(tmp_path: Path) -> None:
    for texts in ([], ["one text"], ["one text", "another", "a third one"]):
        for spread in (None, Spread(ScrambledWorkers(), tmp_path)):
            found = near_duplicate_mask(texts, shingles, 0.8, spread=spread)
            np.testing.assert_array_equal(found, np.zeros(len(texts), bool))


def test_a_bucket_of_template_pages_is_compared_with_kept_ones_only() -> None:
    template = " ".join(WORDS[:100])
    texts = [f"{template} page {i}" for i in range(300)]
    calls: list[str] = []

    def counted(text: str) -> set[str]:
        calls.append(text)
        return shingles(text)

    found = near_duplicate_mask(texts, counted, 0.8)
    assert found.tolist() == [False] + [True] * 299
    assert len(calls) == 300 + 299 + 1  # sketches; the repeats; the kept one


@pytest.mark.usefixtures("small_shards")
@pytest.mark.filterwarnings("ignore::refine_fast.errors.RefineFastWarning")
def test_workers_write_the_bytes_of_the_chunk_stage(tiny: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for i, text in enumerate(corpus(0)):
        heading = f"# Page {i}\n\n" if i % 3 == 0 else ""
        lines = text.replace("word1", ".\n\nword1")
        (docs / f"{i:02}.{'md' if heading else 'txt'}").write_text(heading + lines)
    config = RunConfig(out=tmp_path / "run", docs=docs, model=str(tiny), chunk_tokens=64)
    workers, written = ScrambledWorkers(), []
    for name, chosen in (("plain", None), ("spread", workers)):
        folder = tmp_path / name
        folder.mkdir()
        chunk_stage.run(RunContext(config, tiny, Console(quiet=True), workers=chosen), folder)
        written.append([(folder / file).read_bytes() for file in (CHUNKS, CHUNK_FACTS, TWINS)])
    assert written[0] == written[1]
    assert workers.done.keys() == {"cut", "sketch", "shuffle", "compare"}
    assert min(workers.done.values()) > 1


@pytest.mark.usefixtures("small_shards")
def test_workers_measure_passages(tiny: Path, tmp_path: Path) -> None:
    texts = [" ".join(f"{i}of{word}" for word in WORDS[: 10 * i + 5]) for i in range(8)]
    rows = [json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts)]
    docs, folder = tmp_path / "docs", tmp_path / "chunk"
    docs.mkdir()
    folder.mkdir()
    (docs / "corpus.jsonl").write_text("".join(rows))
    config = RunConfig(out=tmp_path / "run", docs=docs, model=str(tiny))
    said = []
    for workers in (None, ScrambledWorkers()):
        context = RunContext(config, tiny, Console(quiet=True), workers=workers)
        with pytest.warns(RefineFastWarning, match=r"\d of 8 passages are longer") as caught:
            chunk_stage.run(context, folder)
        said.append([str(warning.message) for warning in caught])
    assert said[0] == said[1]
    assert workers is not None
    assert workers.done["measure"] > 1
