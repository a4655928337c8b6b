"""What the issue of the GPU asks for, on the GPU at hand: the contrastive loss and band_topk beside torch, fuse_into beside the bus, and
the loss's share of a training step.

    python benchmarks/bench_gpu.py [loss] [parts] [band] [fuse] [step]

A fraction of the roofline is the time that 6 B N D operations (each part of the loss and band_topk: 2 B N D; fuse: the tuned model's bytes)
would take at the matrix (copy) rate measured in the same run, over the time taken. Memory is the peak beyond inputs and results.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from record import Row, measure, rows, save
from safetensors.torch import save_file
from torch import Tensor, nn

import refine_fast as rf
from refine_fast.workspace import VARIABLE

SHAPES = [(16_384, 384), (16_384, 768), (16_384, 1_024), (65_536, 384), (65_536, 768), (65_536, 1_024)]
HUGE = (1 << 20, 768)
SMALL_WORKSPACE = 240  # MB: with it the loss takes less than 1% of what torch eager does at B = 65,536
TILES = [(128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 256, 64, 4, 2)]
BAND = {"B": 100_000, "N": 10_000_000, "D": 768, "k": 100}
BAND_PEER_ROWS = 12_288  # torch takes minutes for all
CLUSTERS = 10_000  # of unit rows whose cosine is about 0.6: some 1,000 documents in every query's band
PEER_TILE = (4_096, 1 << 18)
STEP = {"batch": 4_096, "tokens": 128}
STEP_BYTES = 12 << 30
ENCODERS = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1_536},
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3_072},
}
MINI_BATCH = {"MiniLM-L6": 256, "BERT-base": 128}  # whose activations fit in it
EAGER_BYTES = 60 << 30  # what torch's three bf16 B x N matrices, or twice as many, must fit in
ROUNDS = 5
LEAST_SAMPLE = 0.05  # seconds


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


def seconds(run: Callable[[], object], calls: int = 1) -> float:
    """Of one call, by the GPU's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def peak_mb(run: Callable[[], object]) -> float:
    """MiB of GPU memory beyond what is held before and what is returned."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = [x for x in run() if isinstance(x, Tensor)]
    return (torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in returned)) / 2**20


def take_turns(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """As record.measure, by the GPU's clock, each sample of as many calls as last LEAST_SAMPLE."""
    calls = {}
    for name, run in contestants.items():
        run()  # compiles
        calls[name] = math.ceil(LEAST_SAMPLE / seconds(run))
    turns = [{name: seconds(run, calls[name]) for name, run in contestants.items()} for _ in range(rounds)]
    return {name: [turn[name] for turn in turns] for name in contestants}


def within(megabytes: int, run: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        os.environ[VARIABLE] = str(megabytes)
        try:
            return run()
        finally:
            del os.environ[VARIABLE]

    return call


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
        contestants = {"refine_fast": train_step(rf.info_nce, q, d)}
        if B == 65_536:
            contestants[f"refine_fast, {SMALL_WORKSPACE} MB"] = within(SMALL_WORKSPACE, contestants["refine_fast"])
        if 10 * B * B < EAGER_BYTES:
            contestants["torch eager"] = train_step(cross_entropy, q, d)
        if B <= 16_384:
            contestants["torch.compile"] = train_step(torch.compile(cross_entropy, dynamic=False), q, d)
        about = {"op": "info_nce", "mode": "train", "dtype": "bf16", "shape": {"B": B, "N": B, "D": D}}
        product = {"torch.mm 8192": matrix_product(torch.bfloat16)}
        samples = take_turns(contestants | product, 1 if (B, D) == HUGE else ROUNDS)
        rate = 2 * 8_192**3 / statistics.median(samples.pop("torch.mm 8192"))
        found = rows(samples, **about, metric="seconds", peer="torch eager")
        save(found + fraction(found, 6 * B * B * D / rate))
        save(rows({name: [peak_mb(run)] for name, run in contestants.items()}, **about, metric="peak_mb", peer="torch eager"))
        del q, d, contestants, product
        torch.cuda.empty_cache()


def bench_parts() -> None:
    """The three products of a wave by themselves; the weights with several tiles."""
    from refine_fast.triton_kernels import info_nce

    B, N = 2_048, 65_536
    own = info_nce.tiling
    for D in (384, 768, 1_024):
        q, d = unit_rows(B, D).detach(), unit_rows(N, D).detach()
        contestants = {}
        for tile in TILES:
            info_nce.tiling = lambda *_: info_nce.Tiling(*tile)  # noqa: B023
            there = info_nce.Direction(q, d, None, None, None, None, torch.tensor(0.02, device="cuda"), None, False)
            e = there._room(B, N)
            contestants["weights {}x{}x{}, {} warps, {} stages".format(*tile)] = lambda there=there, e=e: there.weights(
                slice(0, B), slice(0, N), e
            )
        info_nce.tiling = own
        weights, dq, dd = e[:B, :N].normal_(), torch.zeros(B, D, device="cuda"), torch.zeros(N, D, device="cuda")
        contestants["dq"] = lambda: info_nce._add_product(dq, weights, d)  # noqa: B023
        contestants["dd"] = lambda: info_nce._add_product(dd, weights.T, q)  # noqa: B023
        contestants["torch.mm q d^T"] = lambda: q @ d.T  # noqa: B023
        samples = take_turns(contestants | {"torch.mm 8192": matrix_product(torch.bfloat16)}, ROUNDS)
        rate = 2 * 8_192**3 / statistics.median(samples.pop("torch.mm 8192"))
        about = {"op": "info_nce", "mode": "parts", "dtype": "bf16", "shape": {"B": B, "N": N, "D": D}}
        found = rows(samples, **about, metric="seconds", peer="torch.mm q d^T")
        save(found + fraction(found, 2 * B * N * D / rate))


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
    few = queries[:BAND_PEER_ROWS]
    for asked, peers in (
        (queries, {"torch.mm 8192": matrix_product(torch.float16)}),
        (few, {"torch.mm + topk": lambda: mm_topk(few, docs, BAND["k"] + 5)}),
    ):
        contestants = {"refine_fast": lambda: rf.band_topk(asked, docs, BAND["k"])} | peers  # noqa: B023
        about = {"op": "band_topk", "mode": "skip_then_band", "dtype": "f16", "shape": BAND | {"B": len(asked)}}
        samples = take_turns(contestants, 2)
        if "torch.mm 8192" in peers:
            rate = 2 * 8_192**3 / statistics.median(samples.pop("torch.mm 8192"))
            found = rows(samples, **about, metric="seconds", peer="")
            save(found + fraction(found, 2 * len(asked) * BAND["N"] * BAND["D"] / rate))
            save(rows({"refine_fast": [peak_mb(contestants["refine_fast"])]}, **about, metric="peak_mb", peer=""))
        else:
            save(rows(samples, **about, metric="seconds", peer="torch.mm + topk"))


def bench_fuse() -> None:
    """A 4 GB bf16 model, its tuned twin in the page cache."""
    model = nn.ParameterDict({f"layer{i}": nn.Parameter(torch.randn(4_096, 8_192, device="cuda").bfloat16()) for i in range(64)})
    nbytes = sum(p.nbytes for p in model.values())
    pinned = torch.empty(nbytes // 8, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device="cuda")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tuned.safetensors")
        save_file({name: p.detach().cpu() for name, p in model.items()}, path)
        contestants = {
            "refine_fast": lambda: rf.fuse_into(model, path, 0.35),
            "pinned copy": lambda: [there.copy_(pinned, non_blocking=True) for _ in range(8)],
        }
        samples = measure(contestants, rounds=ROUNDS)
    found = rows(samples, op="fuse_into", mode="cached", dtype="bf16", shape={"bytes": nbytes}, metric="seconds", peer="pinned copy")
    save(found + fraction(found, next(row.p50 for row in found if row.provider == "pinned copy")))


def cached_step(encoder: nn.Module, tokens: Tensor, mini_batch: int, optimizer: torch.optim.Optimizer, loss_seconds: list[float]) -> None:
    """One step on pairs (2 batch, tokens), queries first, with gradient caching (GradCache, Gao et al., arXiv 2101.06983): embeddings
    without a graph, the loss and its gradients on all of them, then a mini-batch at a time with a graph."""

    def embed(block: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return encoder(input_ids=block).last_hidden_state.mean(1)

    blocks = tokens.split(mini_batch)
    with torch.no_grad():
        embeddings = torch.cat([embed(block) for block in blocks]).requires_grad_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    rf.info_nce(*embeddings.chunk(2), normalize=True).backward()
    end.record()
    for block, gradient in zip(blocks, embeddings.grad.split(mini_batch), strict=True):
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
        torch.cuda.reset_peak_memory_stats()
        step = {"step": lambda: cached_step(encoder, tokens, MINI_BATCH[name], optimizer, loss_seconds)}  # noqa: B023
        samples = measure(step, rounds=ROUNDS)
        samples["loss within it"] = loss_seconds[-ROUNDS:]
        about = {"op": "train_step", "mode": name, "dtype": "bf16", "shape": STEP | {"mini_batch": MINI_BATCH[name]}}
        save(rows(samples, **about, metric="seconds", peer="step"))
        save(rows({"step": [torch.cuda.max_memory_allocated() / 2**20]}, **about, metric="peak_mb", peer=""))
    torch.cuda.set_per_process_memory_fraction(1.0)


if __name__ == "__main__":
    parts = {"loss": bench_loss, "parts": bench_parts, "band": bench_band, "fuse": bench_fuse, "step": bench_step}
    for part in sys.argv[1:] or parts:
        parts[part]()
