"""Tries in seconds what a run does in hours, so that nothing is spent on what cannot end well."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from .encoder.check import check_encoder
from .training.check import check_training
from .training.cross_encoder import check_cross_encoder
from .training.trained import Trained

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    from .queries.llm import LLMSettings


def try_encoder(
    folder: Path, *, trust_remote_code: bool = False, trained: Trained | None = None
) -> SentenceTransformer:
    """Encodes two texts in each role, fuses the encoder with itself, and takes a training step.

    Args:
        folder: the folder of the base encoder, as ``prepare_encoder`` returned it.
        trust_remote_code: whether to run Python code in the folder.
        trained: the parameters that will be trained; None: all of them.

    Returns:
        The encoder, unchanged.

    Raises:
        RefineFastError: if a run with this encoder would fail; the message says where.
    """
    model = check_encoder(folder, trust_remote_code=trust_remote_code)
    check_training(model, folder, trained)
    return model


def try_teacher(folder: Path, *, trust_remote_code: bool = False) -> CrossEncoder:
    """Scores two pairs.

    Args:
        folder: the folder of the cross-encoder.
        trust_remote_code: whether to run Python code in the folder.

    Raises:
        RefineFastError: if it cannot teach; the message says why.
    """
    return check_cross_encoder(folder, trust_remote_code=trust_remote_code)


def try_language_model(
    settings: LLMSettings, replies: Path, *, grades: bool = False, keep: bool = True
) -> None:
    """Sends each language model a request as a run sends it, unless ``replies`` has the reply.

    Args:
        settings: the models, and what is asked of them.
        replies: the run's file of replies.
        grades: whether it is asked for grades of passages; otherwise for queries.
        keep: whether the reply is added to the file: it then counts for the limits, and is not
            paid for again.

    Raises:
        RefineFastError: if a model cannot be asked, its replies are of no use, or a batch is open
            at another endpoint.
    """
    from .queries.llm.batch import require_endpoints_of_batches
    from .queries.llm.trial import GRADING, WRITING, try_models

    task = GRADING if grades else WRITING
    if keep:
        try_models(settings, replies, task)
        return
    require_endpoints_of_batches(replies, settings.urls)
    with TemporaryDirectory() as folder:
        store = Path(folder) / replies.name
        if replies.exists():
            shutil.copy(replies, store)
        try_models(settings, store, task)
