"""Contrastive fine-tuning with sentence-transformers' Trainer, resumable after a kill."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import PrinterCallback, TrainerCallback

from ...collectives import copy_from_first_rank, mean_gradients
from ...errors import RefineFastError
from ...files import fsync_all
from ..ranks import Ranks, one_process, peers_may_end
from .batches import Collator, Example, Twin
from .loss import BatchLoss, NonFiniteEmbeddingsError
from .memory import return_free_memory
from .order import grouped_order, random_order
from .teachers import Teachers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHECKPOINT_SECONDS = 60.0
"""Time between two checkpoints: the most that a kill costs, besides the step in progress."""

_WEIGHTS = "model.safetensors"

CHECKPOINT_COMPLETE = "complete"
"""An empty file that a checkpoint gets last, when everything else in it is on the disk."""


MIN_STEPS, MAX_EPOCHS = 30, 4.0
"""Fewer steps hardly change an encoder; in more passes it memorizes the queries."""


def epochs_of(examples: int, *, batch_size: int, epochs: float | Literal["auto"]) -> float:
    """Passes over the examples; "auto": 1, or as many as make ``MIN_STEPS``, up to ``MAX_EPOCHS``.

    Args:
        examples: number of training examples, at least 1.
        batch_size: queries in a batch.
        epochs: as given.
    """
    if epochs != "auto":
        return epochs
    return min(MAX_EPOCHS, max(1.0, MIN_STEPS * min(batch_size, examples) / examples))


def steps_of(examples: int, *, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Number of full batches: a small last batch would weigh its few negatives like a full one.

    Args:
        examples: number of training examples, at least 1.
        batch_size: queries in a batch.
        epochs: passes over the examples.
        max_steps: upper limit; None: no limit.
    """
    # 30 batches of 8 of 88 examples are 29.999999999999996
    steps = max(1, math.floor(examples * epochs / min(batch_size, examples) + 1e-9))
    return steps if max_steps is None else min(steps, max_steps)


def train(
    model: SentenceTransformer,
    examples: Sequence[Example],
    documents: Sequence[str],
    folder: Path,
    *,
    epochs: float = 1.0,
    max_steps: int | None = None,
    batch_size: int = 64,
    lr: float = 1e-4,
    warmup: float = 0.1,
    temperature: float = 0.02,
    mini_batch: int | None = None,
    cached: bool = False,
    bf16: bool = False,
    memory: int | None = None,
    seed: int = 0,
    grouped_by: np.ndarray | None = None,
    twin: Twin | None = None,
    teachers: Teachers | None = None,
    distill: float = 0.0,
    progress: Callable[..., None] | None = None,
    ranks: Ranks | None = None,
    saved: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Fine-tunes ``model`` in place: AdamW, linear warm-up and decay, on one device a process.

    Several ranks share each batch: the steps, the order of the examples and the negatives of a
    query are those of one process, and so is the result, but for the rounding of sums in another
    order. Rank 0 writes the checkpoints, and any number of ranks resumes from them.

    Args:
        model: the encoder.
        examples: what to train on, at least two.
        documents: the texts that the examples' rows name.
        folder: where checkpoints go, for this training alone. Called again with it after a kill,
            training resumes from the last complete checkpoint, and ends with the same weights as
            an uninterrupted run.
        epochs: passes over the examples.
        max_steps: upper limit of the steps.
        batch_size: queries in a batch.
        lr: peak learning rate.
        warmup: share of the steps over which the learning rate rises.
        temperature: of the loss.
        mini_batch: sequences encoded at a time where they are as long as the longest of the batch,
            and as many tokens of others; None: each side of a batch at once.
        cached: gradient caching, so that the activations of one mini-batch live at a time.
        bf16: whether the forward pass runs under bf16 autocast.
        memory: bytes that the process is planned to take at most; None: as few as it can.
        seed: order of the examples.
        grouped_by: (examples, d) float32, a vector for each: similar ones share batches
            (``grouped_order``); None: batches are random.
        twin: frozen embeddings that the loss fuses with the tuned ones.
        teachers: what sets the share ``distill`` of the loss; None: nothing does.
        distill: between 0, InfoNCE alone, and 1, the teachers alone.
        progress: called with (step, steps, note=...).
        ranks: the processes that train together, joined; None: this one alone.
        saved: called after each checkpoint.

    Returns:
        {"steps": number of steps, "epochs": passes over the examples, "loss": [[step, loss], ...]}.

    Raises:
        RefineFastError: if there are too few examples, or the loss becomes NaN or infinite.
    """
    from datasets import Dataset

    if len(examples) < 2:
        raise RefineFastError(
            f"train: {len(examples)} queries are too few to learn from; "
            "give more documents or --queries."
        )
    batch_size = min(batch_size, len(examples))
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    if batch_size < size:
        raise RefineFastError(
            f"train: {size} processes cannot share a batch of {batch_size} queries; "
            "give a larger --batch-size or start fewer processes."
        )
    steps = steps_of(len(examples), batch_size=batch_size, epochs=epochs, max_steps=max_steps)
    # The order of all epochs is fixed beforehand: to resume is to skip, whatever the epoch.
    if grouped_by is None:
        order = random_order(len(examples), steps * batch_size, seed)
    else:
        order = grouped_order(grouped_by, steps * batch_size, seed)

    if rank == 0:
        _remove_incomplete_checkpoints(folder)
    checkpoint = _last_complete_checkpoint(folder) or ""
    if ranks is not None:
        checkpoint = ranks.of_first("checkpoint", checkpoint)
    with one_process():
        arguments = _OneDeviceArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            batch_sampler=_in_order,  # type: ignore[arg-type]
            router_mapping={"query": "query", "document": "document"},
            learning_rate=lr,
            # The last step of a warm-up has the full rate; a single step must not be its first,
            # with 0.
            warmup_steps=min(math.ceil(warmup * steps), steps - 1),
            bf16=bf16,
            use_cpu=model.device.type == "cpu",
            seed=seed,
            save_strategy="no",  # the callback decides when
            save_total_limit=2,  # the newest is incomplete until it is on the disk
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would log a NaN loss as 0
            disable_tqdm=True,
            report_to=[],
            dataloader_pin_memory=model.device.type == "cuda",
        )
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"row": order}),
        data_collator=Collator(model, examples, documents, twin, teachers, rank, size),  # type: ignore[arg-type]
        loss=BatchLoss(
            model,
            temperature,
            mini_batch,
            cached,
            None if twin is None else twin.weight,
            0.0 if teachers is None else distill,
        ),
        callbacks=[_Callback(steps, progress, memory, saved, saves=rank == 0)],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with peers_may_end():
            copy_from_first_rank(list(model.parameters()))
            trainer.train(resume_from_checkpoint=checkpoint or None)
    except (NonFiniteEmbeddingsError, _NonFiniteLossError):
        raise RefineFastError(
            f"train: the loss became NaN or infinite at step {trainer.state.global_step}; "
            f"use a lower --lr than {lr:g}, or --precision fp32."
        ) from None
    history = [[log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log]
    return {"steps": steps, "epochs": steps * batch_size / len(examples), "loss": history}


class _NonFiniteLossError(ArithmeticError):
    """The loss of a step was NaN or infinite."""


class _OneDeviceArguments(SentenceTransformerTrainingArguments):
    """Uses one device, whatever is visible: on several GPUs the Trainer would multiply the batch
    size that the steps, the order of the examples and the memory plan were made for."""

    @property
    def n_gpu(self) -> int:
        return min(1, super().n_gpu)


class _Trainer(SentenceTransformerTrainer):
    """Checkpoints hold the trained parameters only, whatever modules and adapters they are in.

    On every rank it trains as if alone, with a part of each batch. The ranks meet in the loss, and
    here, before the gradients are clipped.
    """

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step's gradients and loss, of the whole batch."""
        loss = super().training_step(*args, **kwargs)
        return mean_gradients(list(self._trained().values()), loss)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Does nothing: the fused model gets a card of its own."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in self._trained().items()}
        save_file(trained, Path(output_dir) / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(saved[name])

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def _in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def _last_complete_checkpoint(folder: Path) -> str | None:
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{CHECKPOINT_COMPLETE}")]
    if not complete:
        return None
    return str(max(complete, key=lambda path: int(path.name.split("-")[1])))


def _remove_incomplete_checkpoints(folder: Path) -> None:
    """What a kill during a save left. ``save_total_limit`` would count it, and remove the last
    complete one for it."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / CHECKPOINT_COMPLETE).exists():
            shutil.rmtree(checkpoint)


class _Callback(TrainerCallback):
    """Watches the loss, reports progress and decides when to save."""

    def __init__(
        self,
        steps: int,
        progress: Callable[..., None] | None,
        memory: int | None,
        tell_saved: Callable[[], None] | None,
        *,
        saves: bool,
    ) -> None:
        self.steps = steps
        self.memory = memory
        self.saves = saves
        self.tell_saved = tell_saved
        self.progress = progress
        self.saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        return_free_memory(self.memory)
        due = self.saves and time.monotonic() - self.saved >= CHECKPOINT_SECONDS
        control.should_save = state.global_step < self.steps and due

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Runs before a checkpoint of the step is saved."""
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise _NonFiniteLossError
        if self.progress is not None:
            self.progress(state.global_step, self.steps, note=f"loss {logs['loss']:.3f}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        fsync_all(checkpoint)
        (checkpoint / CHECKPOINT_COMPLETE).touch()
        if self.tell_saved is not None:
            self.tell_saved()
        self.saved = time.monotonic()
