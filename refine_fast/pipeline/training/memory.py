"""How much memory training takes, and how many sequences fit into a budget."""

from __future__ import annotations

import ctypes
import heapq
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...errors import RefineFastError
from ...integrations.attention import wide_backward
from ..encoder.encode import Role
from .batches import features_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SHARE = 1 / 2
"""Share of the machine's memory that training may take if no budget is given. Of all of it, not of
what is free: a run that was killed resumes with the same plan, and ends with the same weights."""

PROCESS = 900 << 20
"""Bytes: Python, torch, transformers and the data (650 MiB), and heap fragmentation from
short-lived tensors."""

FRAGMENTATION = 1.75
"""Resident memory per byte of saved activations, for mini-batches of different lengths under
glibc's malloc.

Gradient caching, one thread, encoders of 6 layers and width 384 that read 256 tokens (MiniLM) or
512; measured and planned peak in MiB. With a factor of 1.4: MiniLM in fp32, 15 sequences at a time,
2,012 of 2,017; in bf16, 23 at a time, 2,032 of 2,028; MPNet, whose attention keeps its scores, 9 at
a time, 1,825 of 1,930. With 1.3: MPNet 2,075 of 1,951, BERT 1,885 of 1,960, ModernBERT 1,630 of
1,649, in bf16 1,667 of 1,695. Since then every mini-batch holds as many tokens as the first, and
attention's backward pass in bf16 widens what it reads: MiniLM, 3 at a time 1,568 and 16 at a time
2,090, 1.75 bytes per byte between the two (Intel Xeon with AMX, where ``PROCESS`` is 150 short)."""

_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
"""Files with the limit of a container, versions 2 and 1."""

WHOLE_BATCH_OVERHEAD = 1.1
"""The same factor if a whole batch is encoded at once: 6,267 of 7,130 MiB (MiniLM in fp32, 64
queries and 128 documents at a time; benchmarks/memory.py)."""


KEPT_SHARE = 0.85
"""Share of the planned memory up to which malloc keeps what is free: to get 3 GB anew takes a step
of MiniLM a tenth of its time (a virtual machine)."""


def return_free_memory(planned: int | None) -> None:
    """Returns malloc's free pages to the system where the process is about to outgrow its plan:
    steps of other lengths leave gaps that no other tensor fits into. It needs glibc and does
    nothing elsewhere.

    Args:
        planned: bytes that the process is to stay under; None: it has no plan, and keeps nothing.
    """
    import psutil

    if planned is not None and psutil.Process().memory_info().rss < KEPT_SHARE * planned:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def activation_bytes(
    model: SentenceTransformer, text: str, *, bf16: bool, role: Role = "document"
) -> int:
    """Bytes that the backward pass keeps for ``text``.

    Measured as f(2 copies) - f(1 copy), so that per-call casts of the weights cancel.
    """

    def kept(sequences: int) -> int:
        # Views share a storage. The dictionary keeps storages alive, so no address is reused.
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        device = model.device
        batch = {
            name: x.to(device) if isinstance(x, torch.Tensor) else x
            for name, x in features_of(model, role, [text] * sequences).items()
        }
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            torch.autocast(device.type, torch.bfloat16, enabled=bf16),
            wide_backward(device),
        ):
            model(batch)
        return sum(storage.nbytes() for storage in storages.values())

    model.eval()  # as in training
    return max(0, kept(2) - kept(1))


CPU_MINI_BATCH = 16
"""Sequences that a CPU encodes at a time. It gains nothing from more, and sequences of similar
lengths waste little on padding: a step of MiniLM on SQuAD (64 queries, 128 passages) takes 28 s of
CPU time with 8, 29 s with 16 or 32 and 43 s with the whole batch; with gradient caching, 58 s with
126 (AMD EPYC, AVX2)."""


CANDIDATES = 4
"""Texts that are tokenized to find the longest. A character of Chinese, which has three bytes, is a
token; four of English are."""


class Fit(NamedTuple):
    """How many sequences training encodes at a time, and the memory that it takes."""

    mini_batch: int | None
    """None: each side of a batch at once."""
    cached: bool
    """Whether gradients are cached, because the activations of a batch do not fit."""
    peak: int
    """Bytes."""


def fit_training(
    model: SentenceTransformer,
    queries: Iterable[str],
    passages: Iterable[str],
    examples: int,
    *,
    batch_size: int,
    negatives: int,
    memory: int | None,
    bf16: bool,
    processes: int = 1,
) -> Fit:
    """Chooses to keep the activations of the whole batch if they stay under ``memory`` bytes, else
    gradient caching with as many sequences at a time as do, assuming that each is as long as the
    longest.

    Args:
        model: the encoder to train.
        queries: texts of the training queries.
        passages: texts of the passages.
        examples: number of training examples.
        batch_size: queries in a batch.
        negatives: hard negatives of each query.
        memory: bytes that this process may take; None: ``SHARE`` of the device's, divided over the
            processes.
        bf16: whether the forward pass runs in bf16.
        processes: how many train on this device.

    Raises:
        RefineFastError: if ``memory`` is too little for a single sequence.
    """
    batch = min(batch_size, max(examples, 1))
    documents = batch * (1 + negatives)
    # In float32: the weights; gradients and Adam's two moments of those that are trained. In bf16:
    # autocast's copies of the weights.
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = PROCESS + (4 + 2 * bf16) * weights + 12 * trained
    query = activation_bytes(model, _longest(model, queries, "query"), bf16=bf16, role="query")
    passage = activation_bytes(model, _longest(model, passages, "document"), bf16=bf16)
    whole = fixed + WHOLE_BATCH_OVERHEAD * (batch * query + documents * passage)
    each = FRAGMENTATION * max(query, passage)
    least = whole if _reads_bags(model) else fixed + each
    if memory is None:
        memory = max(int(SHARE * machine_memory(model.device) / processes), math.ceil(least))
    if memory < least:
        raise RefineFastError(
            f"memory: {memory / 2**30:.1f} GB is too little for this encoder; "
            f"give at least {math.ceil(least / 2**30 * 10) / 10:.1f}GB."
        )
    fits = int((memory - fixed) / max(each, 1))
    on_cpu = model.device.type == "cpu"
    if fits >= batch + documents or memory >= whole:
        in_parts = on_cpu and documents > CPU_MINI_BATCH and not _reads_bags(model)
        return Fit(CPU_MINI_BATCH if in_parts else None, False, int(whole))
    most = CPU_MINI_BATCH if on_cpu else documents  # of either side: more would change nothing
    mini_batch = min(fits, documents, most)
    return Fit(mini_batch, True, int(fixed + mini_batch * each))


def machine_memory(device: torch.device) -> int:
    """Bytes of memory: the GPU's, or what this process's container may use of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    limits = [psutil.virtual_memory().total]
    for file in _CGROUP_LIMITS:
        try:
            text = Path(file).read_text()
        except OSError:
            continue
        if text.strip().isdigit():  # not "max"
            limits.append(int(text))
    return min(limits)


def _longest(model: SentenceTransformer, texts: Iterable[str], role: Role) -> str:
    """The text with the most tokens among ``CANDIDATES`` of the most characters and as many of the
    most bytes."""
    texts = list(texts)
    sizes = (len, lambda text: len(text.encode("utf-8", "replace")))
    longest = dict.fromkeys(t for size in sizes for t in heapq.nlargest(CANDIDATES, texts, size))
    return max(longest, key=lambda t: _tokens(model, role, t), default="")


def _tokens(model: SentenceTransformer, role: Role, text: str) -> int:
    features = features_of(model, role, [text]).values()
    return sum(x.numel() for x in features if isinstance(x, torch.Tensor))


def _reads_bags(model: SentenceTransformer) -> bool:
    """Whether the encoder reads a batch as one list of tokens, which no mini-batch can be cut
    from: a static embedding, directly or in a route."""
    from sentence_transformers.base.losses.gradcache import has_static_embedding_input

    return has_static_embedding_input(model)
