"""Contrastive fine-tuning: sentence-transformers' Trainer over batches in which every document stands once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

from ..errors import RefineFastError
from ..files import fsync_all
from ..integrations.sentence_transformers.twin import fuse_embeddings
from ..nn import InfoNCELoss
from .embed import prompt_name
from .memory import return_free_memory

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHECKPOINT_SECONDS = 60.0
"""Time between two checkpoints: what a kill costs at most, besides the step in progress."""


@dataclass(frozen=True)
class Example:
    """A query with one of its positives and its mined negatives, as rows of the documents; ``relevant`` are all of its positives."""

    query: str
    positive: int
    negatives: tuple[int, ...]
    relevant: frozenset[int]
    row: int
    """Of the query among the distinct queries."""


@dataclass(frozen=True)
class Twin:
    """The frozen twin's side of ``fuse_embeddings``. It reads the very texts that were embedded to mine from, so those rows stand for it:
    no second encoder in memory, no second forward pass."""

    weight: float
    """Of the tuned embeddings."""
    queries: np.ndarray
    documents: np.ndarray


@dataclass(frozen=True)
class Collator:
    """Rows of the examples to one batch: the queries' tokens, the tokens of the *distinct* documents among positives and negatives, the row
    of each query's positive, and document ids. A document that several queries share is encoded once and is nobody's false negative;
    documents relevant to one query of the batch share an id, so that none of them counts as its negative."""

    model: SentenceTransformer
    examples: Sequence[Example]
    documents: Sequence[str]
    twin: Twin | None = None
    valid_label_columns: tuple[str, ...] = ("label",)  # the Trainer asks for it

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        # Longest first on both sides: mini-batches of one length are little padded.
        examples = sorted((self.examples[row["row"]] for row in rows), key=lambda example: -len(example.query))
        distinct = dict.fromkeys(document for example in examples for document in (example.positive, *example.negatives))
        columns = {document: column for column, document in enumerate(sorted(distinct, key=lambda row: -len(self.documents[row])))}
        groups = list(range(len(columns)))
        for example in examples:
            merged = {groups[columns[document]] for document in example.relevant if document in columns}
            if len(merged) > 1:
                groups = [min(merged) if group in merged else group for group in groups]
        texts = {
            "query": ([example.query for example in examples], prompt_for(self.model, "query")),
            "document": ([self.documents[document] for document in columns], prompt_for(self.model, "document")),
        }
        batch: dict[str, Any] = {
            f"{role}_{name}": value
            for role, (inputs, prompt) in texts.items()
            for name, value in self.model.preprocess(inputs, prompt=prompt).items()
        }
        if self.twin is not None:
            batch["query_frozen"] = torch.from_numpy(self.twin.queries[[example.row for example in examples]])
            batch["document_frozen"] = torch.from_numpy(self.twin.documents[list(columns)])
        batch["document_group"] = torch.tensor(groups)
        batch["label"] = torch.tensor([columns[example.positive] for example in examples])
        return batch


def prompt_for(model: SentenceTransformer, role: Literal["query", "document"]) -> str | None:
    """The model's own prompt for queries or documents; None where it has none."""
    name = prompt_name(model, role)
    return None if name is None else model.prompts[name]


class BatchLoss(CachedLossMixin, nn.Module):
    """InfoNCE over a batch of the collator. With ``mini_batch``, gradient caching (Gao et al., arXiv 2101.06983): encode in mini-batches
    without a graph, take the loss's gradient at the embeddings, encode again and push it through; one mini-batch's activations live at a
    time and the loss still sees the whole batch. With ``twin_weight``, the loss is that of the embeddings fused with the frozen ones that
    the batch carries.

    Without dropout: drawing its masks took 37% of a step on a CPU, and with it attention is not flash attention, in time or memory."""

    def __init__(
        self, model: SentenceTransformer, temperature: float, mini_batch: int | None = None, twin_weight: float | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.mini_batch_size = mini_batch or 0
        self.twin_weight = twin_weight
        self.info_nce = InfoNCELoss(temperature=temperature, normalize=True)

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        self.model.eval()  # the Trainer sets train() before every step
        queries, documents = features
        self.groups = documents.pop("group")
        self.frozen = [side.pop("frozen") for side in features] if self.twin_weight is not None else []
        if self.mini_batch_size:
            return self.forward_cached(features, labels)
        return self.calculate_loss([[self.model(side)["sentence_embedding"]] for side in (queries, documents)], labels)

    def calculate_loss(self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False) -> Tensor:
        q, d = (torch.cat(parts) for parts in reps)
        if self.twin_weight is not None:
            q, d = (fuse_embeddings(tuned, frozen, self.twin_weight) for tuned, frozen in zip((q, d), self.frozen, strict=True))
        loss = self.info_nce(q, d, positives=labels, doc_ids=self.groups)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


def steps_of(examples: int, *, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Full batches only: a small last batch would weigh its few negatives like a full one's."""
    steps = max(1, math.floor(examples * epochs / min(batch_size, examples)))
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
    bf16: bool = False,
    seed: int = 0,
    twin: Twin | None = None,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Fine-tunes ``model`` in place and returns {"steps", "loss": [[step, loss], ...]}. Checkpoints go to ``folder``, which must serve this
    training alone; called again with it after a kill, training goes on from the last whole checkpoint to the very weights that an
    uninterrupted run ends with. AdamW, linear warm-up and decay; ``mini_batch`` turns gradient caching on, ``twin`` puts the fusion with a
    frozen twin's embeddings into the loss."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from transformers import PrinterCallback

    if len(examples) < 2:
        raise RefineFastError(f"train: {len(examples)} queries are too few to learn from; give more documents or --queries.")
    batch_size = min(batch_size, len(examples))
    steps = steps_of(len(examples), batch_size=batch_size, epochs=epochs, max_steps=max_steps)
    # The order of all epochs is laid out beforehand: to resume is to skip, whatever the epoch.
    random = np.random.default_rng(seed)
    passes = math.ceil(steps * batch_size / len(examples))
    order = np.concatenate([random.permutation(len(examples)) for _ in range(passes)])[: steps * batch_size]

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        batch_sampler=_in_order,  # type: ignore[arg-type]
        learning_rate=lr,
        warmup_steps=math.ceil(warmup * steps),
        bf16=bf16,
        use_cpu=model.device.type == "cpu",
        seed=seed,
        save_strategy="no",  # the callback says when
        save_total_limit=2,  # the newest may be half-written after a kill
        logging_steps=1,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=model.device.type == "cuda",
    )

    class Trainer(SentenceTransformerTrainer):
        def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
            """None: the fused model gets a card of ours."""

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"row": order}),
        data_collator=Collator(model, examples, documents, twin),  # type: ignore[arg-type]
        loss=BatchLoss(model, temperature, mini_batch, None if twin is None else twin.weight),
        callbacks=[_callback(steps, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(folder))
    losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    if not all(math.isfinite(loss) for _, loss in losses):
        raise RefineFastError(f"train: the loss became NaN or infinite; give a lower --lr than {lr:g} or --precision fp32.")
    return {"steps": steps, "loss": losses}


def _in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


WHOLE = "whole"
"""An empty file that a checkpoint gets last, when everything else in it is on the disk."""


def _last_whole_checkpoint(folder: Path) -> str | None:
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{WHOLE}")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def _callback(steps: int, progress: Callable[..., None] | None) -> Any:
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        saved = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            return_free_memory()
            control.should_save = state.global_step < steps and time.monotonic() - self.saved >= CHECKPOINT_SECONDS

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if progress is not None and logs and "loss" in logs:
                progress(state.global_step, steps, note=f"loss {logs['loss']:.3f}")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            fsync_all(checkpoint)
            (checkpoint / WHOLE).touch()
            self.saved = time.monotonic()

    return Callback()
