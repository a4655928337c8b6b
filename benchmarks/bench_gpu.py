"""Measures the operations on a GPU: the contrastive loss beside torch and memeff, band_topk beside
torch, fuse_into beside the bus, and the loss's share of a training step.

    python benchmarks/bench_gpu.py [target] [band] [fuse] [parts] [loss] [step] [huge]

target is the loss at B = 65,536, loss at B = 16,384, huge at B = 1,048,576. Each shape's rows are
saved before the next one starts. memeff (pip install memeff; an unpacked wheel on PYTHONPATH will
do) is measured where it is installed, and named where it is not.

A fraction of the roofline is the time that 6 B N D operations (each part of the loss and band_topk:
2 B N D; fuse: the tuned model's bytes) would take at the matrix (copy) rate measured in the same
run, over the time taken. Memory is the peak beyond inputs and results.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import refine_fast as rf
from refine_fast.bench import rows as table
from refine_fast.bench.measuring import measure
from refine_fast.bench.operations.info_nce import memeff_loss as memeff
from refine_fast.bench.rows import Row, rows
from refine_fast.workspace import VARIABLE

RESULTS = Path(__file__).parent / "results"
WIDTHS = (768, 384, 1_024)
TARGET, SMALL, HUGE = 65_536, 16_384, 1 << 20  # rows of the loss
SMALL_WORKSPACE = 240  # MB, with which the loss takes less than 1% of torch eager's at TARGET
TILES = [
    (128, 256, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 4),
    (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 3),
    (64, 256, 64, 4, 2),
]
BAND = {"B": 100_000, "N": 10_000_000, "D": 768, "k": 100}
BAND_PEER_ROWS = 4_096  # torch takes minutes for all
CLUSTERS = 10_000  # of unit rows with cosines of about 0.6: 1,000 documents in a query's band
PEER_TILE = (4_096, 1 << 18)
STEP = {"batch": 4_096, "tokens": 128}
STEP_BYTES = 12 << 30
ENCODERS = {
    "MiniLM-L6": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1_536,
    },
    "BERT-base": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3_072,
    },
}
MINI_BATCH = {"MiniLM-L6": 256, "BERT-base": 128}  # whose activations fit in it
EAGER_BYTES = 60 << 30  # what torch's three bf16 B x N matrices, or twice as many, must fit in
WAVE = 2_048  # rows of the loss whose products are measured by themselves
FUSED = {"tensors": 64, "rows": 4_096, "columns": 8_192}
PRODUCT, SIDE = "torch.mm 8192", 8_192
ROUNDS = 5
MIN_SAMPLE = 0.05  # seconds


Contestants = Mapping[str, Callable[[], object]]


def save(found: list[Row]) -> None:
    """Keeps the rows and prints them."""
    table.save(found, RESULTS)
    print(*map(table.line, found), sep="\n", flush=True)


def unit_rows(n: int, d: int) -> Tensor:
    """(n, d) bfloat16 rows on the GPU that require a gradient."""
    return F.normalize(torch.randn(n, d, device="cuda"), dim=-1).bfloat16().requires_grad_()


def train_step(
    loss: Callable[[Tensor, Tensor], Tensor], q: Tensor, d: Tensor
) -> Callable[[], object]:
    """A call of the loss with its gradients."""
    return lambda: torch.autograd.grad(loss(q, d), (q, d))


def cross_entropy(q: Tensor, d: Tensor) -> Tensor:
    """The loss in plain torch, with the B x N matrix."""
    return F.cross_entropy(q @ d.T / 0.02, torch.arange(len(q), device=q.device))


def matrix_product(dtype: torch.dtype) -> Contestants:
    """SIDE^3 on random data: the rate that a roofline is drawn from."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=dtype) for _ in range(2))
    return {PRODUCT: lambda: a @ b}


def matrix_rate(samples: dict[str, list[float]]) -> float:
    """FLOP/s of ``matrix_product``, whose samples are taken out."""
    return 2 * SIDE**3 / statistics.median(samples.pop(PRODUCT))


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


def take_turns(contestants: Contestants, rounds: int) -> dict[str, list[float]]:
    """As refine_fast.bench.measuring, by the GPU's clock, each sample of as many calls as last
    MIN_SAMPLE. With 0 rounds, one call of each. A peer that fails is named and left out."""
    calls, first = {}, {}
    for name, run in contestants.items():
        try:
            run()  # compiles
        except Exception as error:
            if name.startswith("refine_fast"):
                raise
            print(f"{name} is left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        first[name] = seconds(run)
        calls[name] = math.ceil(MIN_SAMPLE / first[name])
    if rounds == 0:
        return {name: [sample] for name, sample in first.items()}
    turns = [
        {name: seconds(contestants[name], count) for name, count in calls.items()}
        for _ in range(rounds)
    ]
    return {name: [turn[name] for turn in turns] for name in calls}


def within(megabytes: int, run: Callable[[], object]) -> Callable[[], object]:
    """``run`` with a workspace of so many megabytes."""

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
        made.append(
            replace(
                row,
                metric="fraction_of_roofline",
                unit="1",
                p20=worst,
                p50=middle,
                p80=best,
                ratio_to_peer=None,
                peer="",
            )
        )
    return made


def memeff_loss() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """memeff's Triton InfoNCE with the loss and gradients of ours, where it is installed."""
    if find_spec("memeff") is None:
        print("memeff is left out: not installed (pip install memeff)", flush=True)
        return {}
    return {"memeff": memeff(0.02)}


def bench_rows(B: int, D: int, rounds: int) -> None:
    """The loss of B unit rows against as many, with gradients."""
    q, d = unit_rows(B, D), unit_rows(B, D)
    contestants = {"refine_fast": train_step(rf.info_nce, q, d)}
    if B == TARGET:
        small = within(SMALL_WORKSPACE, contestants["refine_fast"])
        contestants[f"refine_fast, {SMALL_WORKSPACE} MB"] = small
    if 10 * B * B < EAGER_BYTES:
        contestants["torch eager"] = train_step(cross_entropy, q, d)
        contestants |= {name: train_step(loss, q, d) for name, loss in memeff_loss().items()}
    if B <= SMALL:
        compiled = torch.compile(cross_entropy, dynamic=False)
        contestants["torch.compile"] = train_step(compiled, q, d)
    about = {"op": "info_nce", "mode": "train", "dtype": "bf16"}
    about |= {"shape": {"B": B, "N": B, "D": D}}
    product = matrix_product(torch.bfloat16)
    samples = take_turns(contestants | product, rounds)
    rate = matrix_rate(samples)
    found = rows(samples, **about, metric="seconds", peer="torch eager")
    save(found + fraction(found, 6 * B * B * D / rate))
    peaks = {name: [peak_mb(contestants[name])] for name in samples}
    save(rows(peaks, **about, metric="peak_mb", peer="torch eager"))
    del q, d, contestants, product
    torch.cuda.empty_cache()


def bench_target() -> None:
    """The loss at B = 65,536."""
    for D in WIDTHS:
        bench_rows(TARGET, D, ROUNDS)


def bench_loss() -> None:
    """The loss at B = 16,384, torch.compile among the peers."""
    for D in WIDTHS:
        bench_rows(SMALL, D, ROUNDS)


def bench_huge() -> None:
    """The loss at B = 1,048,576, where a call takes a quarter of a minute."""
    bench_rows(HUGE, 768, 0)


def bench_parts() -> None:
    """The three products of a wave by themselves; the weights with several tiles."""
    from refine_fast.triton_kernels import info_nce
    from refine_fast.triton_kernels.info_nce_plan import Tiling

    B, N = WAVE, TARGET
    own, temperature = info_nce.tiling, torch.tensor(0.02, device="cuda")
    for D in WIDTHS:
        q, d = unit_rows(B, D).detach(), unit_rows(N, D).detach()
        contestants = {}
        for tile in TILES:
            info_nce.tiling = lambda *_, tile=tile: Tiling(*tile)
            there = info_nce.Direction(q, d, None, None, None, None, temperature, None, False)
            e = there.weights_buffer(B, N)
            name = "weights {}x{}x{}, {} warps, {} stages".format(*tile)
            contestants[name] = partial(there.weights, slice(0, B), slice(0, N), e)
        info_nce.tiling = own
        weights = e[:B, :N].normal_()
        dq, dd = torch.zeros(B, D, device="cuda"), torch.zeros(N, D, device="cuda")
        contestants["dq"] = partial(info_nce._add_product, dq, weights, d)
        contestants["dd"] = partial(info_nce._add_product, dd, weights.T, q)
        contestants["torch.mm q d^T"] = partial(torch.mm, q, d.T)
        samples = take_turns(contestants | matrix_product(torch.bfloat16), ROUNDS)
        rate = matrix_rate(samples)
        about = {"op": "info_nce", "mode": "parts", "dtype": "bf16"}
        about |= {"shape": {"B": B, "N": N, "D": D}}
        found = rows(samples, **about, metric="seconds", peer="torch.mm q d^T")
        save(found + fraction(found, 2 * B * N * D / rate))


def clustered(rows: int, seed: int) -> Tensor:
    """(rows, D) float16 unit rows around CLUSTERS centers, made in blocks."""
    generator = torch.Generator("cuda").manual_seed(seed)
    centers = F.normalize(
        torch.randn(
            CLUSTERS, BAND["D"], device="cuda", generator=torch.Generator("cuda").manual_seed(0)
        ),
        dim=-1,
    )
    made = torch.empty(rows, BAND["D"], device="cuda", dtype=torch.float16)
    for block in made.split(1 << 18):
        noise = torch.randn(block.shape, device="cuda", generator=generator) * (
            0.816 / BAND["D"] ** 0.5
        )
        own = torch.randint(CLUSTERS, (len(block),), device="cuda", generator=generator)
        block.copy_(F.normalize(centers[own] + noise, dim=-1))
    return made


def mm_topk(queries: Tensor, docs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar, of all documents: what torch has, in tiles that fit in memory. It cannot
    answer the band."""
    found = []
    for q in queries.split(PEER_TILE[0]):
        best = (
            q.new_full((len(q), k), float("-inf")),
            torch.zeros((len(q), k), dtype=torch.int64, device="cuda"),
        )
        for start in range(0, len(docs), PEER_TILE[1]):
            scores, ids = torch.topk(q @ docs[start : start + PEER_TILE[1]].T, k)
            scores, ids = torch.cat([best[0], scores], 1), torch.cat([best[1], ids + start], 1)
            kept = torch.topk(scores, k)
            best = kept.values, ids.gather(1, kept.indices)
        found.append(best)
    return torch.cat([scores for scores, _ in found]), torch.cat([ids for _, ids in found])


def bench_band() -> None:
    """All queries against the roofline, then a few beside torch."""
    queries, docs = clustered(BAND["B"], 1), clustered(BAND["N"], 2)
    about = {"op": "band_topk", "mode": "skip_then_band", "dtype": "f16"}
    ours = {"refine_fast": partial(rf.band_topk, queries, docs, BAND["k"])}
    samples = take_turns(ours | matrix_product(torch.float16), 2)
    rate = matrix_rate(samples)
    found = rows(samples, **about, shape=BAND, metric="seconds", peer="")
    save(found + fraction(found, 2 * BAND["B"] * BAND["N"] * BAND["D"] / rate))
    peak = {"refine_fast": [peak_mb(ours["refine_fast"])]}
    save(rows(peak, **about, shape=BAND, metric="peak_mb", peer=""))
    few, peer = queries[:BAND_PEER_ROWS], "torch.mm + topk"
    contestants = {
        "refine_fast": partial(rf.band_topk, few, docs, BAND["k"]),
        peer: partial(mm_topk, few, docs, BAND["k"] + 5),
    }
    shape = BAND | {"B": len(few)}
    save(rows(take_turns(contestants, 2), **about, shape=shape, metric="seconds", peer=peer))


def bench_fuse() -> None:
    """A 4 GB bf16 model; the tuned one is in the page cache."""
    sizes = FUSED["rows"], FUSED["columns"]
    weights = (torch.randn(sizes, device="cuda").bfloat16() for _ in range(FUSED["tensors"]))
    model = nn.ParameterDict({f"layer{i}": nn.Parameter(x) for i, x in enumerate(weights)})
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
    about = {"op": "fuse_into", "mode": "cached", "dtype": "bf16", "shape": {"bytes": nbytes}}
    found = rows(samples, **about, metric="seconds", peer="pinned copy")
    bus = next(row.p50 for row in found if row.provider == "pinned copy")
    save(found + fraction(found, bus))


def cached_step(
    encoder: nn.Module,
    tokens: Tensor,
    mini_batch: int,
    optimizer: torch.optim.Optimizer,
    loss_seconds: list[float],
) -> None:
    """One step on pairs (2 batch, tokens), queries first, with gradient caching (GradCache, Gao et
    al., arXiv 2101.06983): embeddings without a graph, the loss and its gradients on all of them,
    then a mini-batch at a time with a graph."""

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
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(STEP_BYTES / total)
    for name, shape in ENCODERS.items():
        config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        encoder = BertModel(config, add_pooling_layer=False).cuda()
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5, fused=True)
        tokens = torch.randint(1_000, 30_000, (2 * STEP["batch"], STEP["tokens"]), device="cuda")
        loss_seconds: list[float] = []
        torch.cuda.reset_peak_memory_stats()
        mini_batch = MINI_BATCH[name]
        step = partial(cached_step, encoder, tokens, mini_batch, optimizer, loss_seconds)
        samples = measure({"step": step}, rounds=ROUNDS)
        samples["loss within it"] = loss_seconds[-ROUNDS:]
        about = {"op": "train_step", "mode": name, "dtype": "bf16"}
        about |= {"shape": STEP | {"mini_batch": mini_batch}}
        save(rows(samples, **about, metric="seconds", peer="step"))
        peak = {"step": [torch.cuda.max_memory_allocated() / 2**20]}
        save(rows(peak, **about, metric="peak_mb", peer=""))
    torch.cuda.set_per_process_memory_fraction(1.0)


PARTS = {
    "target": bench_target,
    "band": bench_band,
    "fuse": bench_fuse,
    "parts": bench_parts,
    "loss": bench_loss,
    "step": bench_step,
    "huge": bench_huge,
}


def main(parts: list[str]) -> None:
    """Runs the parts; all of them where none is named."""
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"no part is called {unknown[0]}: {' '.join(PARTS)}")
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU")
    table.place()
    for part in parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main(sys.argv[1:])
