"""What the issue of the GPU asks for, on the GPU at hand: the contrastive loss and band_topk beside torch, fuse_into beside the bus, and
the loss's share of a training step.

    python benchmarks/bench_gpu.py [loss] [band] [fuse] [step]

A fraction of the roofline is the time that 6 B N D operations (band_topk: 2 B N D; fuse: the tuned model's bytes) would take at the matrix
(copy) rate measured in the same run, over the time taken.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from record import Row, measure, rows, save
from safetensors.torch import save_file
from torch import Tensor, nn

import refine_fast as rf

SHAPES = [(16_384, 384), (16_384, 768), (16_384, 1_024), (65_536, 384), (65_536, 768), (65_536, 1_024)]
HUGE = (1 << 20, 768)
BAND = {"B": 100_000, "N": 10_000_000, "D": 768, "k": 100}
CLUSTERS = 10_000  # of unit rows whose cosine is about 0.6: some 1,000 documents in every query's band
PEER_TILE = (4_096, 1 << 18)
STEP = {"batch": 4_096, "tokens": 128, "mini_batch": 256}
STEP_BYTES = 12 << 30
ENCODERS = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1_536},
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3_072},
}
EAGER_BYTES = 60 << 30  # torch's five bf16 B x N matrices must fit in this
ROUNDS = 5


def unit_rows(n: int, d: int) -> Tensor:
    return F.normalize(torch.randn(n, d, device="cuda"), dim=-1).bfloat16().requires_grad_()


def train_step(loss: Callable[[Tensor, Tensor], Tensor], q: Tensor, d: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(q, d), (q, d))


def cross_entropy(q: Tensor, d: Tensor) -> Tensor:
    return F.cross_entropy(q @ d.T / 0.02, torch.arange(len(q), device=q.device))


def matrix_product(dtype: torch.dtype) -> Callable[[], object]:
    """8,192^3 on random data: the rate that a roofline is drawn from."""
    a, b = (torch.randn(8_192, 8_192, device="cuda", dtype=dtype) for _ in range(2))
    return lambda: a @ b


def peak_mb(run: Callable[[], object]) -> float:
    """MiB of GPU memory beyond what is held, after a warm-up."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def fraction(found: list[Row], ideal: float) -> list[Row]:
    """Rows of seconds as fractions of what the roofline allows."""
    made = []
    for row in found:
        worst, middle, best = ideal / row.p80, ideal / row.p50, ideal / row.p20
        made.append(replace(row, metric="fraction_of_roofline", unit="1", p20=worst, p50=middle, p80=best, ratio_to_peer=None, peer=""))
    return made


def bench_loss() -> None:
    for B, D in [*SHAPES, HUGE]:
        q, d = unit_rows(B, D), unit_rows(B, D)
        contestants = {"refine_fast": train_step(rf.info_nce, q, d), "torch.mm 8192": matrix_product(torch.bfloat16)}
        if 10 * B * B < EAGER_BYTES:
            contestants["torch eager"] = train_step(cross_entropy, q, d)
        if B <= 16_384:
            contestants["torch.compile"] = train_step(torch.compile(cross_entropy), q, d)
        about = {"op": "info_nce", "mode": "train", "dtype": "bf16", "shape": {"B": B, "N": B, "D": D}}
        samples = measure(contestants, rounds=1 if (B, D) == HUGE else ROUNDS)
        rate = 2 * 8_192**3 / statistics.median(samples.pop("torch.mm 8192"))
        found = rows(samples, **about, metric="seconds", peer="torch eager")
        save(found + fraction(found, 6 * B * B * D / rate))
        del contestants["torch.mm 8192"]
        save(rows({name: [peak_mb(run)] for name, run in contestants.items()}, **about, metric="peak_mb", peer="torch eager"))


def clustered(rows: int, seed: int) -> Tensor:
    """(rows, D) float16 unit rows around CLUSTERS centers, made in blocks."""
    generator = torch.Generator("cuda").manual_seed(seed)
    centers = F.normalize(torch.randn(CLUSTERS, BAND["D"], device="cuda", generator=torch.Generator("cuda").manual_seed(0)), dim=-1)
    made = torch.empty(rows, BAND["D"], device="cuda", dtype=torch.float16)
    for block in made.split(1 << 18):
        noise = torch.randn(block.shape, device="cuda", generator=generator) * (0.816 / BAND["D"] ** 0.5)
        own = torch.randint(CLUSTERS, (len(block),), device="cuda", generator=generator)
        block.copy_(F.normalize(centers[own] + noise, dim=-1))
    return made


def mm_topk(queries: Tensor, docs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar, of all documents: what torch has, in tiles that fit in memory. It cannot answer the band."""
    found = []
    for q in queries.split(PEER_TILE[0]):
        best = q.new_full((len(q), k), float("-inf")), torch.zeros((len(q), k), dtype=torch.int64, device="cuda")
        for start in range(0, len(docs), PEER_TILE[1]):
            scores, ids = torch.topk(q @ docs[start : start + PEER_TILE[1]].T, k)
            scores, ids = torch.cat([best[0], scores], 1), torch.cat([best[1], ids + start], 1)
            kept = torch.topk(scores, k)
            best = kept.values, ids.gather(1, kept.indices)
        found.append(best)
    return torch.cat([scores for scores, _ in found]), torch.cat([ids for _, ids in found])


def bench_band() -> None:
    queries, docs = clustered(BAND["B"], 1), clustered(BAND["N"], 2)
    contestants = {
        "refine_fast": lambda: rf.band_topk(queries, docs, BAND["k"]),
        "torch.mm + topk": lambda: mm_topk(queries, docs, BAND["k"] + 5),
        "torch.mm 8192": matrix_product(torch.float16),
    }
    about = {"op": "band_topk", "mode": "skip_then_band", "dtype": "f16", "shape": BAND}
    samples = measure(contestants, rounds=2)
    rate = 2 * 8_192**3 / statistics.median(samples.pop("torch.mm 8192"))
    found = rows(samples, **about, metric="seconds", peer="torch.mm + topk")
    save(found + fraction(found, 2 * BAND["B"] * BAND["N"] * BAND["D"] / rate))
    peaks = {"refine_fast": [peak_mb(contestants["refine_fast"])]}
    save(rows(peaks, **about, metric="peak_mb", peer=""))


def bench_fuse() -> None:
    """A 4 GB bf16 model, its tuned twin in the page cache."""
    model = nn.ParameterDict({f"layer{i}": nn.Parameter(torch.randn(4_096, 8_192).bfloat16()) for i in range(64)})
    nbytes = sum(p.nbytes for p in model.values())
    pinned = torch.empty(nbytes // 8, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tuned.safetensors")
        save_file({name: p.detach() for name, p in model.items()}, path)
        model.cuda()
        contestants = {
            "refine_fast": lambda: rf.fuse_into(model, path, 0.35),
            "pinned copy": lambda: [there.copy_(pinned, non_blocking=True) for _ in range(8)],
        }
        samples = measure(contestants, rounds=ROUNDS)
    found = rows(samples, op="fuse_into", mode="cached", dtype="bf16", shape={"bytes": nbytes}, metric="seconds", peer="pinned copy")
    save(found + fraction(found, next(row.p50 for row in found if row.provider == "pinned copy")))


def cached_step(encoder: nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer, loss_seconds: list[float]) -> None:
    """One step on pairs (2 batch, tokens), queries first, with gradient caching (GradCache, Gao et al., arXiv 2101.06983): embeddings
    without a graph, the loss and its gradients on all of them, then a mini-batch at a time with a graph."""

    def embed(block: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return encoder(input_ids=block).last_hidden_state.mean(1)

    blocks = tokens.split(STEP["mini_batch"])
    with torch.no_grad():
        embeddings = torch.cat([embed(block) for block in blocks]).requires_grad_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    rf.info_nce(*embeddings.chunk(2), normalize=True).backward()
    end.record()
    for block, gradient in zip(blocks, embeddings.grad.split(STEP["mini_batch"]), strict=True):
        embed(block).backward(gradient)
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    loss_seconds.append(start.elapsed_time(end) / 1e3)


def bench_step() -> None:
    """Random encoders of two shapes, in STEP_BYTES of memory."""
    from transformers import BertConfig, BertModel

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(STEP_BYTES / torch.cuda.get_device_properties(0).total_memory)
    for name, shape in ENCODERS.items():
        config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        encoder = BertModel(config, add_pooling_layer=False).cuda()
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5, fused=True)
        tokens = torch.randint(1_000, 30_000, (2 * STEP["batch"], STEP["tokens"]), device="cuda")
        loss_seconds: list[float] = []
        samples = measure({"step": lambda: cached_step(encoder, tokens, optimizer, loss_seconds)}, rounds=ROUNDS)  # noqa: B023
        samples["loss within it"] = loss_seconds[-ROUNDS:]
        about = {"op": "train_step", "mode": name, "dtype": "bf16", "shape": STEP}
        save(rows(samples, **about, metric="seconds", peer="step"))
        save(rows({"step": [torch.cuda.max_memory_allocated() / 2**20]}, **about, metric="peak_mb", peer=""))
    torch.cuda.set_per_process_memory_fraction(1.0)


if __name__ == "__main__":
    parts = {"loss": bench_loss, "band": bench_band, "fuse": bench_fuse, "step": bench_step}
    for part in sys.argv[1:] or parts:
        parts[part]()
