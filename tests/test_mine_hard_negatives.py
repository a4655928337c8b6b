"""mine_hard_negatives beside sentence-transformers' own: the same rows wherever the rule is the
same, and more where theirs gives up.

The cases are those of its tests/util/test_hard_negatives.py; the model is a table of word vectors,
so no weights are needed."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("datasets", reason="needs the pipeline: pip install '.[pipeline]'")
pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import mine_hard_negatives as theirs
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from refine_fast.integrations.sentence_transformers import mine_hard_negatives as ours

FACTS = [
    ("What is the capital of France", "Paris is the capital of France and a large city"),
    ("Who wrote the novel 1984", "Orwell wrote the novel 1984 which is a dystopia"),
    ("What is the largest planet", "Jupiter is the largest planet and the fifth from the sun"),
    ("Who painted the portrait", "Leonardo painted the portrait in 1503"),
    ("What is the speed of light", "The speed of light in vacuum is a constant"),
]
OTHERS = [
    "Madrid is the capital of Spain and its largest city",
    "Rowling wrote the Potter series",
    "Saturn is the sixth planet from the sun",
    "Vincent painted the starry night",
    "Sound has a speed of 343 in air",
]


@pytest.fixture(scope="module")
def model() -> SentenceTransformer:
    words = sorted(
        {
            word
            for text in [*itertools.chain(*FACTS), *OTHERS, "query :", "Copy 0 1 2 3"]
            for word in text.split()
        }
    )
    tokenizer = Tokenizer(
        WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(0).standard_normal((len(words) + 1, 24)).astype(np.float32)
    return SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu"
    )


@pytest.fixture(scope="module")
def single() -> Dataset:
    return Dataset.from_dict({"question": [q for q, _ in FACTS], "answer": [a for _, a in FACTS]})


@pytest.fixture(scope="module")
def several() -> Dataset:
    """Two positives a query, as two rows."""
    return Dataset.from_dict(
        {
            "question": [q for q, _ in FACTS] * 2,
            "answer": [f"Copy {i} {a}" for i in range(2) for _, a in FACTS],
        }
    )


class WordOverlap:
    """A cross-encoder's interface over the share of common words, with a fraction that no two pairs
    share."""

    def predict(self, pairs: list[tuple[str, str]], **_: Any) -> torch.Tensor:
        return torch.tensor(
            [len(set(q.split()) & set(d.split())) / 8 + sum(map(ord, d)) / 1e5 for q, d in pairs]
        )

    def __repr__(self) -> str:  # without an address: a test has the same name in every process
        return "WordOverlap()"


def same(dataset: Dataset, model: SentenceTransformer, **arguments: Any) -> Dataset:
    """Asserts that both functions return the same dataset, scores to float32's rounding."""
    random.seed(3)
    mine = ours(dataset, model, verbose=False, **arguments)
    random.seed(3)
    other = theirs(dataset, model, verbose=False, **arguments)
    assert mine.column_names == other.column_names
    assert len(mine) == len(other)
    for name in mine.column_names:
        for left, right in zip(mine[name], other[name], strict=True):
            assert left == (
                pytest.approx(right, abs=1e-6) if name in ("score", "scores") else right
            )
    return mine


@pytest.mark.parametrize("pairs", ["single", "several"])
@pytest.mark.parametrize("output_scores", [False, True])
@pytest.mark.parametrize(
    "output_format", ["triplet", "n-tuple", "labeled-pair", "labeled-list", "n-tuple-scores"]
)
def test_formats(
    request: pytest.FixtureRequest,
    model: SentenceTransformer,
    output_format: str,
    output_scores: bool,
    pairs: str,
) -> None:
    dataset = request.getfixturevalue(pairs)
    found = same(
        dataset, model, corpus=OTHERS, output_format=output_format, output_scores=output_scores
    )
    unique = len(set(dataset["question"]))
    assert len(found) == {
        "triplet": 3 * len(dataset),
        "labeled-pair": len(dataset) + 3 * unique,
    }.get(output_format, len(dataset))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_negatives": 1, "range_max": 1},
        {"range_min": 1, "range_max": 4},
        {"range_max": 6, "max_score": 0.6, "min_score": 0.1},
        {"range_max": 6, "absolute_margin": 0.1},
        {"range_max": 6, "relative_margin": 0.05},
        {"range_max": 6, "margin": 0.2},
        {
            "range_min": 2,
            "absolute_margin": 0.05,
            "relative_margin": 0.1,
            "max_score": 0.9,
            "min_score": -0.5,
            "num_negatives": 2,
        },
        {"sampling_strategy": "random"},
        {"sampling_strategy": "random", "range_min": 1, "range_max": 7, "max_score": 0.7},
        {"include_positives": True},
        {"include_positives": True, "output_format": "labeled-list", "range_max": 3},
        {"as_triplets": False},
        {"query_prompt": "query : ", "corpus_prompt": "Copy 3 "},
        {"anchor_column_name": "answer", "positive_column_name": "question"},
        {"use_faiss": False, "faiss_batch_size": 2},
        {
            "cross_encoder": WordOverlap(),
            "range_max": 5,
            "max_score": 0.9,
            "min_score": 0.2,
            "num_negatives": 2,
        },
        {"cross_encoder": WordOverlap(), "absolute_margin": 0.01, "num_negatives": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("pairs", ["single", "several"])
def test_rules(
    request: pytest.FixtureRequest,
    model: SentenceTransformer,
    pairs: str,
    arguments: dict[str, Any],
) -> None:
    same(
        request.getfixturevalue(pairs),
        model,
        corpus=OTHERS,
        output_scores=True,
        **{"output_format": "labeled-pair", **arguments},
    )


@pytest.mark.parametrize("output_format", ["triplet", "n-tuple", "labeled-pair", "labeled-list"])
def test_missing_negatives_are_reported(
    capsys: pytest.CaptureFixture[str],
    model: SentenceTransformer,
    several: Dataset,
    output_format: str,
) -> None:
    """The count and the share in the message are sentence-transformers' own."""

    def message(mine: Callable[..., Dataset]) -> str:
        capsys.readouterr()
        mine(
            several,
            model=model,
            corpus=OTHERS,
            max_score=0.1,
            range_max=6,
            output_format=output_format,
            verbose=True,
        )
        return next(
            line for line in capsys.readouterr().out.splitlines() if "Could not find" in line
        ).split(").")[0]

    assert message(ours) == message(theirs)


def test_finds_what_lies_beyond_the_window() -> None:
    """The negatives below max_score come after 200 ranks: theirs looks at 4 + 30 of them and drops
    the row."""
    angle = torch.linspace(0, 1.5, 400)
    corpus = torch.stack([angle.cos(), angle.sin()], 1)
    texts = [f"text {i}" for i in range(400)]
    pairs = Dataset.from_dict({"anchor": ["query"], "positive": texts[:1]})
    found = ours(
        pairs,
        None,
        corpus=texts,
        max_score=0.5,
        embeddings=(torch.tensor([[2.0, 0.0]]), corpus.numpy()),
        verbose=False,
    )
    first = int((angle.cos() > 0.5).sum())
    assert found["negative"] == texts[first : first + 3]


def test_returns_every_row_that_has_enough() -> None:
    """A row is missing where fewer than range_min + num_negatives documents besides its positives
    lie in the band, and nowhere else."""
    generator = torch.Generator().manual_seed(0)
    queries, corpus = (
        torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1)
        for n in (200, 600)
    )
    texts = [f"text {i}" for i in range(600)]
    pairs = Dataset.from_dict(
        {"anchor": [f"query {i}" for i in range(200)], "positive": texts[:200]}
    )
    rule = {
        "min_score": 0.5,
        "max_score": 0.7,
        "range_min": 5,
        "num_negatives": 10,
        "output_format": "n-tuple",
    }
    found = ours(pairs, None, corpus=texts, embeddings=(queries, corpus), verbose=False, **rule)  # type: ignore[arg-type]
    scores = queries.double() @ corpus.double().T
    scores[range(200), range(200)] = -1
    enough = ((scores >= 0.5) & (scores <= 0.7)).sum(1) >= 15
    assert 0 < int(enough.sum()) < 200
    assert found["anchor"] == [f"query {i}" for i in enough.nonzero().flatten().tolist()]


def test_the_papers_order_skips_the_most_similar_of_all(
    model: SentenceTransformer, single: Dataset
) -> None:
    arguments = {
        "corpus": OTHERS,
        "max_score": 0.5,
        "num_negatives": 1,
        "output_scores": True,
        "verbose": False,
    }
    skipped_inside = ours(single, model, range_min=2, **arguments)
    skipped_first = ours(single, model, range_min=2, order="skip_then_band", **arguments)
    unskipped = ours(single, model, **arguments)
    assert skipped_inside["negative"] != skipped_first["negative"]
    above = [
        s[0]
        for s in zip(skipped_first["negative"], unskipped["negative"], strict=True)
        if s[0] == s[1]
    ]
    assert above, "where two documents lie above the band, the skip is used up there"


def test_cache_is_shared_with_theirs(
    model: SentenceTransformer, single: Dataset, tmp_path: Path
) -> None:
    theirs(single, model, corpus=OTHERS, cache_folder=str(tmp_path), verbose=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2
    ours(single, model, corpus=OTHERS, cache_folder=str(tmp_path), verbose=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for path in tmp_path.iterdir():
        path.unlink()
    ours(single, model, corpus=OTHERS, cache_folder=str(tmp_path), verbose=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_negatives": 0}, r"num_negatives must be an integer >= 1 \(got 0\)"),
        ({"range_min": -1}, r"range_min must be an integer >= 0 \(got -1\)"),
        ({"range_min": 3, "range_max": 3}, "leave 0 ranks for 3 negatives"),
        ({"range_max": 2}, "leave 2 ranks for 3 negatives"),
        ({"output_format": "quintuple"}, "output_format must be one of"),
        ({"sampling_strategy": "best"}, "sampling_strategy must be"),
        (
            {"embeddings": (torch.zeros(4, 3), torch.zeros(5, 3))},
            "there are 5 unique anchors, but 4 embeddings",
        ),
    ],
    ids=str,
)
def test_errors(
    model: SentenceTransformer, single: Dataset, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ours(single, model, verbose=False, **arguments)
    with pytest.raises(ValueError, match="the dataset is empty"):
        ours(single.select([]), model)
    with pytest.raises(ValueError, match="needs one of anchors and one of positives"):
        ours(single.remove_columns("answer"), model)


class Numbers:
    """No SentenceTransformer: only what sentence-transformers' function calls. The score of two
    texts falls with the difference of the numbers in them."""

    device = torch.device("cpu")

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        return np.array([[float(text.split()[-1])] for text in texts], np.float32)

    encode_document = encode_query

    def similarity(self, queries: np.ndarray, texts: torch.Tensor) -> torch.Tensor:
        return -(torch.as_tensor(queries) - torch.as_tensor(texts).T).abs()

    def similarity_pairwise(self, queries: np.ndarray, texts: torch.Tensor) -> torch.Tensor:
        return -(torch.as_tensor(queries) - torch.as_tensor(texts)).abs()[:, 0]


NUMBERED = Dataset.from_dict({"question": ["q 1", "q 20"], "answer": ["a 2", "a 26"]})
MORE_NUMBERS = [f"a {i}" for i in range(3, 30, 4)]


class ByDistance(SentenceTransformer):
    """Says "cosine" and compares by a distance."""

    def similarity(self, *rows: Any) -> torch.Tensor:
        return -torch.cdist(*map(torch.as_tensor, rows), p=1)

    def similarity_pairwise(self, *rows: Any) -> torch.Tensor:
        left, right = map(torch.as_tensor, rows)
        return -(left - right).abs().sum(-1)


@pytest.mark.parametrize("similarity", ["dot", "euclidean", "manhattan"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"range_max": 5, "absolute_margin": 0.05, "sampling_strategy": "random"}],
    ids=str,
)
def test_every_similarity(
    model: SentenceTransformer, single: Dataset, similarity: str, arguments: dict[str, Any]
) -> None:
    other = SentenceTransformer(modules=list(model), device="cpu", similarity_fn_name=similarity)
    same(single, other, corpus=OTHERS, output_scores=True, **arguments)


def test_a_similarity_of_its_own(model: SentenceTransformer, single: Dataset) -> None:
    by_class = ByDistance(modules=list(model), device="cpu")
    by_instance = SentenceTransformer(modules=list(model), device="cpu")
    by_instance.similarity = by_class.similarity
    by_instance.similarity_pairwise = by_class.similarity_pairwise
    by_attribute = SentenceTransformer(modules=list(model), device="cpu", similarity_fn_name="dot")
    by_attribute._similarity = by_class.similarity
    by_attribute._similarity_pairwise = by_class.similarity_pairwise
    for other in (by_class, by_instance, by_attribute):
        found = same(single, other, corpus=OTHERS, output_scores=True)
        assert max(found["scores"][0]) < 0
    assert found["negative"] != ours(single, model, corpus=OTHERS, verbose=False)["negative"]


def test_a_model_of_another_class() -> None:
    found = same(NUMBERED, Numbers(), corpus=MORE_NUMBERS, output_scores=True, num_negatives=2)  # type: ignore[arg-type]
    assert found["negative"] == ["a 3", "a 7", "a 19", "a 23"]


def test_a_router_and_its_prompts(model: SentenceTransformer, single: Dataset) -> None:
    (static,) = model
    table = static.embedding.weight.detach().flip(0).clone()
    routed = Router.for_query_document(
        query_modules=[static],
        document_modules=[StaticEmbedding(static.tokenizer, embedding_weights=table)],
    )
    prompts = {"query": "query : ", "document": "Copy "}
    other = SentenceTransformer(modules=[routed], device="cpu", prompts=prompts)
    found = same(single, other, corpus=OTHERS, output_scores=True)
    assert found["negative"] != ours(single, model, corpus=OTHERS, verbose=False)["negative"]


def test_half_precision(model: SentenceTransformer, single: Dataset) -> None:
    half = SentenceTransformer(modules=copy.deepcopy(list(model)), device="cpu").half()
    mine, peer = (
        mined(single, half, corpus=OTHERS, output_scores=True, verbose=False)
        for mined in (ours, theirs)
    )
    np.testing.assert_allclose(mine["scores"], peer["scores"], atol=2e-3)


@pytest.mark.parametrize("half", [False, True])
def test_a_text_without_a_token(
    model: SentenceTransformer, half: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its row is all zeros; in half precision sentence-transformers makes NaN of it, which would
    be the most similar of all."""
    if half:
        model = SentenceTransformer(modules=copy.deepcopy(list(model)), device="cpu").half()
    pairs = Dataset.from_dict({"question": ["planet", ""], "answer": ["Jupiter is", "light"]})
    rule = {"num_negatives": 1, "min_score": 1e-4, "output_scores": True, "verbose": False}
    with caplog.at_level("WARNING"):
        found = ours(pairs, model, corpus=["", "the largest planet"], **rule)  # type: ignore[arg-type]
    assert (found["question"], found["negative"]) == (["planet"], ["the largest planet"])
    assert ("NaN or Inf in the embeddings of 1 texts, first ''" in caplog.text) == half


def test_what_no_model_can_answer(model: SentenceTransformer, single: Dataset) -> None:
    with pytest.raises(ValueError, match="model is None and there are no embeddings"):
        ours(single, None)
    other = ByDistance(modules=list(model), device="cpu")
    with pytest.raises(ValueError, match="order='skip_then_band' needs a SentenceTransformer"):
        ours(single, other, order="skip_then_band")

    class TwoScores(WordOverlap):
        def predict(self, pairs: list[tuple[str, str]], **_: Any) -> torch.Tensor:
            return torch.zeros(len(pairs), 2)

    with pytest.raises(ValueError, match=r"one score per pair \(got 2\)"):
        ours(single, model, cross_encoder=TwoScores(), max_score=0.5, verbose=False)  # type: ignore[arg-type]
