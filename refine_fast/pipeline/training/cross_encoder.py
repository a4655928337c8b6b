"""A cross-encoder as a teacher: it reads query and passage together, too slow to search with, and
the better judge of which passage answers (arXiv 2010.02666, 2104.06967).

Scores are logits, whatever activation the model was saved with: a sigmoid would flatten the
differences between good passages.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import RefineFastError
from ...files import atomic
from ..encoder.encode import has_fast_bf16
from ..encoder.load import device, is_cross_encoder, why_not_loaded
from ..progress import Progress
from ..reserve import save_rows

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

BATCH = 32
"""Pairs per forward pass."""

BLOCK = 4 * BATCH
"""Pairs between two looks at the clock and at Ctrl-C: the most that a kill costs."""

_QUERY = "where does the cat sleep"
_PASSAGES = ("On the warm stove in the kitchen.", "The pump is oiled every six weeks. " * 64)
"""The second one is longer than most models read."""


def load_cross_encoder(folder: Path, *, trust_remote_code: bool = False) -> CrossEncoder:
    """Loads a cross-encoder onto the device that it will run on.

    Args:
        folder: a local folder; nothing is downloaded.
        trust_remote_code: whether to run Python code that the folder brings.

    Raises:
        RefineFastError: if it is not a cross-encoder with one label, or cannot be loaded.
    """
    from sentence_transformers import CrossEncoder
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would show for a tenth of a second
    if not is_cross_encoder(folder):
        raise RefineFastError(
            f"teacher: {folder} is not a cross-encoder; give a model that scores pairs of texts, "
            "such as cross-encoder/ms-marco-MiniLM-L6-v2."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = CrossEncoder(
                str(folder),
                device=device().type,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                model_kwargs={"dtype": torch.float32},
            )
    except Exception as error:
        raise RefineFastError(
            f"teacher: {why_not_loaded(folder, error, 'a cross-encoder')}"
        ) from None
    if model.num_labels != 1:
        raise RefineFastError(
            f"teacher: {folder} must have 1 label (got {model.num_labels}); "
            "give another cross-encoder."
        )
    return model


def check_cross_encoder(folder: Path, *, trust_remote_code: bool = False) -> CrossEncoder:
    """Loads a cross-encoder and scores two pairs.

    Args:
        folder: as for ``load_cross_encoder``.
        trust_remote_code: as for ``load_cross_encoder``.

    Raises:
        RefineFastError: if it cannot teach; the message gives the reason.
    """
    model = load_cross_encoder(folder, trust_remote_code=trust_remote_code)
    try:
        one, other = pair_logits(model, [(_QUERY, text) for text in _PASSAGES], bf16=False)
    except RefineFastError:
        raise
    except Exception as error:
        raise RefineFastError(
            f"teacher: {folder} cannot score a pair ({type(error).__name__}: {_short(error)}); "
            "check that CrossEncoder.predict works in sentence-transformers."
        ) from None
    if one == other:
        raise RefineFastError(
            f"teacher: {folder} gives different passages the same score, so it reads none of their "
            "words; raise its max_length, or give another one."
        )
    return model


def pair_logits(
    model: CrossEncoder, pairs: Sequence[tuple[str, str]], *, bf16: bool | None = None
) -> np.ndarray:
    """The logits of pairs of a query and a passage, (P,) float32.

    Args:
        model: with one label.
        pairs: P >= 1 of them.
        bf16: whether the forward pass runs under bf16 autocast; None: if the hardware has bf16
            products.

    Raises:
        RefineFastError: if a logit is NaN or infinite.
    """
    bf16 = has_fast_bf16(model.device) if bf16 is None else bf16
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        logits: np.ndarray = model.predict(
            list(pairs),
            batch_size=BATCH,
            activation_fn=torch.nn.Identity(),
            show_progress_bar=False,
        )
    if not np.isfinite(logits).all():
        remedy = "use --precision fp32" if bf16 else "give another cross-encoder"
        raise RefineFastError(f"teacher: the logit of a pair is NaN or infinite; {remedy}.")
    return logits


def logits_of(
    model: CrossEncoder,
    pairs: Sequence[tuple[int, int]],
    queries: Sequence[str],
    passages: Sequence[str],
    file: Path,
    *,
    bf16: bool | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """As ``pair_logits``, for any number of pairs, batched by length and resumable.

    Args:
        model: with one label.
        pairs: P of them, (row of a query, row of a passage).
        queries: the texts of the queries.
        passages: the texts of the passages.
        file: a .npy file of the logits so far, for these pairs alone. After a kill, the pairs that
            it lacks are scored, in the same batches.
        bf16: as for ``pair_logits``.
        progress: called with (scored pairs, P).
    """
    if not file.exists():
        with atomic(file) as temporary:
            save_rows(temporary, np.full(len(pairs), np.nan, np.float32))
    logits = np.load(file, mmap_mode="r+")
    # Longest first: little padding, and memory that is too small fails at once.
    order = np.argsort([-len(queries[q]) - len(passages[d]) for q, d in pairs], kind="stable")
    for start in range(0, len(pairs), BLOCK):
        block = order[start : start + BLOCK]
        if np.isnan(logits[block]).any():
            texts = [(queries[q], passages[d]) for q, d in (pairs[i] for i in block)]
            logits[block] = pair_logits(model, texts, bf16=bf16)
        if progress is not None:
            progress(start + len(block), len(pairs))
    return np.asarray(logits)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
