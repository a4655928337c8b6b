"""sentence-transformers' ``mine_hard_negatives`` over ``band_topk``: the same signature, the same
columns and every row that has enough negatives, without a similarity matrix.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...files import atomic
from ...ops.band_topk import band_topk
from .mined_rows import FORMATS, columns_of, print_report

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder, SentenceTransformer

logger = logging.getLogger(__name__)


def mine_hard_negatives(
    dataset: Dataset,
    model: SentenceTransformer | None,
    anchor_column_name: str | None = None,
    positive_column_name: str | None = None,
    corpus: list[str] | None = None,
    cross_encoder: CrossEncoder | None = None,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    min_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    num_negatives: int = 3,
    sampling_strategy: Literal["random", "top"] = "top",
    query_prompt_name: str | None = None,
    query_prompt: str | None = None,
    corpus_prompt_name: str | None = None,
    corpus_prompt: str | None = None,
    include_positives: bool = False,
    output_format: str = "triplet",
    output_scores: bool = False,
    batch_size: int = 32,
    faiss_batch_size: int = 16384,
    use_faiss: bool = False,
    use_multi_process: list[str] | bool = False,
    verbose: bool = True,
    cache_folder: str | None = None,
    as_triplets: bool | None = None,
    margin: float | None = None,
    *,
    order: Literal["band_then_skip", "skip_then_band"] = "band_then_skip",
    embeddings: tuple[Any, Any] | None = None,
) -> Dataset:
    """Mines negatives for a dataset of (anchor, positive) pairs; a drop-in for
    ``sentence_transformers.util.mine_hard_negatives`` (6.2).

    A model that scores its embeddings by anything but its class's own cosine or dot product (a
    distance, a similarity of its own, an encoder that is no SentenceTransformer) is left to
    sentence-transformers' code, at its cost and with its rows.

    Args:
        range_max: None searches the whole corpus, not a few dozen ranks beyond range_min, so that a
            row is missing only where the corpus has too few negatives. "random" still draws from as
            many ranks as sentence-transformers does. A given range_max, and a cross_encoder that
            filters, mean what they mean there.
        use_faiss, faiss_batch_size: accepted and ignored; the search is always exact.
        order: "band_then_skip" skips range_min documents among those that pass the filters, as
            sentence-transformers does; "skip_then_band" skips the most similar of all first, which
            is REFINE's rule (arXiv 2410.12890, section 3.2); for cosine and dot product only.
        embeddings: those of the unique anchors and of the unique texts of corpus + positives, each
            in order of first appearance, instead of ``model`` (pass None). Rows of any length:
            scores are cosines.

        Every other argument is documented in sentence-transformers.

    Returns:
        A dataset in ``output_format``.

    Raises:
        ValueError: as in sentence-transformers; neither a model nor embeddings; "skip_then_band"
            with a model that is left to sentence-transformers.
    """
    if embeddings is None and not _compares_by_cosine(model):
        given = {name: x for name, x in locals().items() if name not in ("order", "embeddings")}
        return _theirs(given, order)
    if len(dataset) == 0:
        raise ValueError("the dataset is empty; give at least one (anchor, positive) pair")
    columns = dataset.column_names
    if len(columns) < 2:
        raise ValueError(
            f"the dataset has only the column {columns}; it needs one of anchors and one of"
            " positives"
        )
    anchor_column = anchor_column_name if anchor_column_name in columns else columns[0]
    positive_column = positive_column_name if positive_column_name in columns else columns[1]
    if as_triplets is not None:
        output_format = "triplet" if as_triplets else "n-tuple"
        logger.warning("as_triplets is deprecated: output_format is set to %r", output_format)
    if output_format == "n-tuple-scores":
        output_format, output_scores = "n-tuple", True
        logger.warning(
            "output_format 'n-tuple-scores' is deprecated: use 'n-tuple' with output_scores=True"
        )
    if margin is not None:
        absolute_margin = margin
        logger.warning("margin is deprecated: absolute_margin is set to %s", margin)
    if include_positives and output_format != "n-tuple":
        output_format = "n-tuple"
        logger.warning(
            "include_positives keeps the order of the ranking: output_format is set to 'n-tuple'"
        )
    if output_format not in FORMATS:
        raise ValueError(
            f"output_format must be one of {', '.join(FORMATS)} (got {output_format!r})"
        )
    if sampling_strategy not in ("top", "random"):
        raise ValueError(f'sampling_strategy must be "top" or "random" (got {sampling_strategy!r})')
    if num_negatives < 1:
        raise ValueError(f"num_negatives must be an integer >= 1 (got {num_negatives})")
    if range_min < 0:
        raise ValueError(f"range_min must be an integer >= 0 (got {range_min})")

    # [:]: not row by row
    anchors, answers = (list(dataset[column][:]) for column in (anchor_column, positive_column))
    row_of_query, row_of_text = _numbered(anchors), _numbered([*(corpus or []), *answers])
    queries, texts = list(row_of_query), list(row_of_text)
    owned: list[dict[int, None]] = [{} for _ in queries]
    for anchor, answer in zip(anchors, answers, strict=True):
        owned[row_of_query[anchor]][row_of_text[answer]] = None
    positives = [list(rows) for rows in owned]
    most = max(Counter(anchors).values())

    filtered = any(x is not None for x in (absolute_margin, relative_margin, max_score, min_score))
    rescored = cross_encoder is not None and filtered
    window = range_max
    if window is None:  # sentence-transformers' own default
        loose = (
            absolute_margin is not None
            or relative_margin is not None
            or max_score is not None
            or rescored
        )
        window = range_min + num_negatives * (10 if loose else 1) + most
    if window - range_min < num_negatives:
        left = max(window - range_min, 0)
        raise ValueError(
            f"range_min={range_min} and range_max={window} leave {left} ranks for {num_negatives}"
            " negatives"
        )

    if embeddings is None:
        embeddings = _encode(
            model,  # type: ignore[arg-type]
            {"query": queries, "corpus": texts},
            {
                "query": (query_prompt, query_prompt_name),
                "corpus": (corpus_prompt, corpus_prompt_name),
            },
            batch_size,
            use_multi_process,
            cache_folder,
            verbose,
        )
    encoded_queries, encoded_texts = (torch.as_tensor(x) for x in embeddings)
    for rows, unique, name in (
        (encoded_queries, queries, "anchors"),
        (encoded_texts, texts, "texts"),
    ):
        if len(rows) != len(unique):
            raise ValueError(
                f"there are {len(unique)} unique {name}, but {len(rows)} embeddings of them"
            )

    if rescored:
        assert cross_encoder is not None
        positive_scores = _predict(
            cross_encoder, queries, texts, positives, batch_size, use_multi_process
        )
    else:
        owner = torch.tensor([i for i, rows in enumerate(positives) for _ in rows])
        flat = torch.tensor([row for rows in positives for row in rows])
        cosines = torch.nn.functional.cosine_similarity(
            encoded_queries[owner].float(), encoded_texts[flat].float()
        )
        positive_scores = list(cosines.split([len(rows) for rows in positives]))

    least = torch.stack([scores.min() for scores in positive_scores]).double()
    ceiling = torch.full_like(least, float("inf") if max_score is None else max_score)
    if absolute_margin is not None:
        ceiling = ceiling.minimum(least - absolute_margin)
    if relative_margin is not None:
        ceiling = ceiling.minimum(least - least.abs() * relative_margin)
    floor = -float("inf") if min_score is None else min_score
    exclude = None if include_positives else positives

    # the first ranks of the corpus, positives among them, then the filters
    if range_max is not None or rescored:
        found = band_topk(
            encoded_queries,
            encoded_texts,
            window + most,
            band=(-float("inf"), float("inf")),
            skip=0,
            normalize=True,
        )
        candidates = [ids[ids >= 0].tolist() for ids in found.ids]
        scores = [row[: len(ids)] for row, ids in zip(found.scores, candidates, strict=True)]
        if rescored:
            assert cross_encoder is not None
            scores = _predict(
                cross_encoder, queries, texts, candidates, batch_size, use_multi_process
            )
        ranked = [
            _ranked(
                ids,
                row,
                () if exclude is None else exclude[i],
                floor,
                float(ceiling[i]),
                range_min,
                window,
                order,
            )
            for i, (ids, row) in enumerate(zip(candidates, scores, strict=True))
        ]
    else:
        found = band_topk(
            encoded_queries,
            encoded_texts,
            num_negatives if sampling_strategy == "top" else window - range_min,
            band=(floor, float("inf")),
            ceiling=ceiling,
            skip=range_min,
            exclude=exclude,
            order=order,
            normalize=True,
        )
        ranked = [
            [(i, s) for i, s in zip(ids, row, strict=True) if i >= 0]
            for ids, row in zip(found.ids.tolist(), found.scores.tolist(), strict=True)
        ]
    if sampling_strategy == "random":
        # draws as sentence-transformers does, so the same random.seed gives the same rows
        for i, options in enumerate(ranked):
            drawn = random.sample(range(max(len(options), num_negatives)), k=num_negatives)
            ranked[i] = [options[j] for j in sorted(drawn) if j < len(options)]
    negatives = [row[:num_negatives] for row in ranked]

    shape = num_negatives, output_format, output_scores, len(dataset)
    table, possible = columns_of(queries, texts, positives, positive_scores, negatives, *shape)
    names = {"anchor": anchor_column, "positive": positive_column}
    from datasets import Dataset

    mined = Dataset.from_dict({names.get(name, name): values for name, values in table.items()})
    if verbose:
        print_report(positive_scores, negatives, possible - len(mined), possible)
    return mined


def _compares_by_cosine(model: object) -> bool:
    """Whether sentence-transformers would score this model's unit rows by their cosines."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import SimilarityFunction

    if not isinstance(model, SentenceTransformer):
        return False
    name = model.similarity_fn_name  # sets the two functions below
    functions = {
        "similarity": SimilarityFunction.to_similarity_fn(name),
        "similarity_pairwise": SimilarityFunction.to_similarity_pairwise_fn(name),
    }
    return name in ("cosine", "dot") and all(
        getattr(getattr(model, method), "__func__", None) is getattr(SentenceTransformer, method)
        and getattr(model, f"_{method}", None) is function
        for method, function in functions.items()
    )


def _theirs(given: dict[str, Any], order: str) -> Dataset:
    """sentence-transformers' own ``mine_hard_negatives`` of the same arguments."""
    from sentence_transformers.util import mine_hard_negatives as theirs

    if given["model"] is None:
        raise ValueError("model is None and there are no embeddings: give one of them")
    if order != "band_then_skip":
        raise ValueError(
            f"order={order!r} needs a SentenceTransformer whose similarity is cosine or dot; set"
            " model.similarity_fn_name to cosine, or give the embeddings"
        )
    return theirs(**given)


def _numbered(texts: Iterable[str]) -> dict[str, int]:
    """Each text once, in order of appearance, with its number."""
    number: dict[str, int] = {}
    for text in texts:
        number.setdefault(text, len(number))
    return number


def _encode(
    model: SentenceTransformer,
    texts: dict[str, list[str]],
    prompts: dict[str, tuple[str | None, str | None]],
    batch_size: int,
    use_multi_process: list[str] | bool,
    cache_folder: str | None,
    verbose: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows of the queries and of the corpus, through the cache files of sentence-transformers
    (same names, same content)."""
    pool = None
    encoded = []
    try:
        for role, encode in (("query", model.encode_query), ("corpus", model.encode_document)):
            prompt, prompt_name = prompts[role]
            file = None
            if cache_folder is not None:
                name = (model.model_card_data.base_model or "", prompt, prompt_name, texts[role])
                digest = hashlib.sha256(repr(name).encode(), usedforsecurity=False).hexdigest()
                file = Path(cache_folder) / f"{role}_embeddings_{digest}.npy"
            if file is not None and file.exists():
                encoded.append(np.load(file))
                continue
            if use_multi_process and pool is None:
                pool = model.start_multi_process_pool(
                    None if isinstance(use_multi_process, bool) else use_multi_process
                )
            rows = encode(
                texts[role],
                prompt_name=prompt_name,
                prompt=prompt,
                batch_size=batch_size,
                pool=pool,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=verbose,
            )
            encoded.append(rows)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic(file) as temporary, temporary.open("wb") as out:
                    np.save(out, rows)
    finally:
        if pool is not None:
            model.stop_multi_process_pool(pool)
    for role, rows in zip(texts, encoded, strict=True):
        odd = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(odd):  # half precision divides the zeros of a text without a token by their length
            logger.warning(
                "NaN or Inf in the embeddings of %d texts, first %r: their scores count as 0",
                len(odd),
                texts[role][odd[0]],
            )
            rows[odd] = 0
    return encoded[0], encoded[1]


def _predict(
    cross_encoder: CrossEncoder,
    queries: list[str],
    texts: list[str],
    rows: Sequence[Sequence[int]],
    batch_size: int,
    use_multi_process: list[str] | bool,
) -> list[Tensor]:
    """The cross-encoder's score of each query with each of its rows."""
    pool = None
    if use_multi_process:
        pool = cross_encoder.start_multi_process_pool(
            None if isinstance(use_multi_process, bool) else use_multi_process
        )
    try:
        pairs = [(queries[i], texts[row]) for i, own in enumerate(rows) for row in own]
        scores = cross_encoder.predict(
            pairs, batch_size=batch_size, convert_to_tensor=True, pool=pool
        )
    finally:
        if pool is not None:
            cross_encoder.stop_multi_process_pool(pool)
    if scores.ndim != 1:
        raise ValueError(
            f"cross_encoder must give one score per pair (got {scores.shape[1:].numel()}); use one"
            " with num_labels=1"
        )
    return list(scores.float().cpu().split([len(own) for own in rows]))


def _ranked(
    ids: list[int],
    scores: Tensor,
    exclude: Sequence[int],
    floor: float,
    ceiling: float,
    range_min: int,
    range_max: int,
    order: str,
) -> list[tuple[int, float]]:
    """What remains of one query's candidates between the ranks range_min and range_max, best
    first."""
    left_out = set(exclude)
    ranking = sorted(
        ((i, s) for i, s in zip(ids, scores.tolist(), strict=True) if i not in left_out),
        key=lambda pair: -pair[1],
    )
    if order == "skip_then_band":
        ranking, range_min, range_max = ranking[range_min:range_max], 0, range_max - range_min
    return [(i, s) for i, s in ranking if floor <= s <= ceiling][range_min:range_max]
