"""Checks that an encoder can be trained and its result fused, before anything is spent on it."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...errors import RefineFastError
from ...files import of_the_disk, write_errors
from ...fuse.compatibility import compare_models
from ...fuse.plan import make_plan
from ..encoder.encode import encode, unit_of_similarity
from .batches import Collator, Example
from .loss import BatchLoss
from .trained import Trained

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn

_QUERIES = ("where does the cat sleep", "how often is the seal of a pump replaced")
_DOCUMENTS = (
    "The cat sleeps on the warm stove in the kitchen all day.",
    "The seal of the pump is replaced every six weeks by the crew of the first shift.",
)


def check_training(
    model: SentenceTransformer, folder: Path, trained: Trained | None = None
) -> None:
    """Takes one training step on two examples with a copy of the model, saves the copy to a
    temporary folder, and plans its fusion with the base.

    Args:
        model: the base encoder; not changed.
        folder: the folder that it was loaded from.
        trained: the parameters that are trained; None: all of them.

    Raises:
        RefineFastError: if a step fails; the message says which and why.
        OSError: if the temporary folder cannot be written.
    """
    tuned = copy.deepcopy(model)
    adapters = (trained or Trained()).choose(tuned)
    try:
        gradients = _one_step(tuned)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RefineFastError(
            f"model: {folder} cannot be trained ({type(error).__name__}: {reason}); "
            "give another encoder."
        ) from error
    _require_trained_routes(tuned, gradients)
    for adapter in adapters:
        adapter.merge_and_unload()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            with write_errors(Path(temporary)):
                tuned.save_pretrained(temporary, create_model_card=False)
        except Exception as error:
            if of_the_disk(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise RefineFastError(
                f"model: {folder} can be trained but not saved ({type(error).__name__}: {reason}); "
                "give another encoder."
            ) from error
        make_plan(folder, Path(temporary), [0.5], force=True)
        if changed := compare_models(folder, Path(temporary)).refused:
            raise RefineFastError(
                f"model: {folder} changes when it is loaded and saved ({'; '.join(changed[:2])},"
                " where tuned is what was saved), so that its result would not fit it; save it once"
                " with sentence-transformers and give that copy."
            )


def _one_step(model: SentenceTransformer) -> dict[str, bool]:
    """Trained parameter -> whether it got a gradient. Takes the step."""
    examples = [Example(query, i, (), frozenset({i}), i) for i, query in enumerate(_QUERIES)]
    batch = Collator(model, examples, _DOCUMENTS)([{"row": 0}, {"row": 1}])
    device = model.device
    sides = [
        {
            name.removeprefix(f"{role}_"): x.to(device) if isinstance(x, torch.Tensor) else x
            for name, x in batch.items()
            if name.startswith(f"{role}_")
        }
        for role in ("query", "document")
    ]
    # Without the unit, large dot products make the loss, and with it every gradient, exactly 0.
    q = encode(model, _QUERIES, role="query", bf16=False)
    d = encode(model, _DOCUMENTS, role="document", bf16=False)
    temperature = 0.05 * unit_of_similarity(model, q, d)
    BatchLoss(model, temperature=temperature)(sides, batch["label"].to(device)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.optim.AdamW(trained.values(), lr=1e-5).step()
    for name, parameter in trained.items():
        if not parameter.isfinite().all():
            raise ArithmeticError(f"{name} became NaN or infinite")
    return {name: p.grad is not None and bool(p.grad.any()) for name, p in trained.items()}


def _require_trained_routes(model: nn.Module, gradients: dict[str, bool]) -> None:
    """Every route of a router, or else the whole model, must have learned something."""
    from sentence_transformers.base.modules import Router

    parts = {
        f"{name}.sub_modules.{route}.": f"its {route} route"
        for name, module in model.named_modules()
        if isinstance(module, Router)
        for route in module.sub_modules
    } or {"": "it"}
    for prefix, what in parts.items():
        names = [name for name in gradients if name.startswith(prefix)]
        if names and not any(gradients[name] for name in names):
            raise RefineFastError(
                f"model: {what} gets no gradient, so training would change nothing; "
                "give another encoder."
            )
