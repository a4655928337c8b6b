"""fuse beside its peers.

Every contender writes one fused model and flushes it to the disk; ``cp`` copies one of the two
inputs and flushes it: fusing two models should cost no more than copying one. "cold": the inputs
are dropped from the page cache before each run; "warm": they are read once before. Disks drift more
than anything else; look at the ratios, each within one run. So does memory: the host of a virtual
machine takes free pages back, and who reads and writes through the page cache waits for new ones.
"cold" waits before each run until that is done, as where a machine has been idle; before "cold,
memory in use" all free memory is written to, as if it were the machine's own.

The peers do what their users run:

- loop: safetensors' ``safe_open`` and ``torch.lerp`` tensor by tensor, a shard saved at a time;
- lm_cocktail: the arithmetic of LM_Cocktail.mix_models, ``sum(weight * state_dict[name])`` over
  whole state dicts in float32;
- mergekit: method linear, by its command ``mergekit-yaml`` on the PATH, or the one that
  REFINE_FAST_MERGEKIT names (its requirements may need an environment of its own);
- sentence_transformers: ``SentenceTransformer.merge`` and ``save_pretrained``, where mergekit is
  installed; refine_fast_merge is our ``merge`` in its place.

"device" is no merge but the floor under one: the bytes of both inputs read and those of the output
written, all past the page cache and at once, with no arithmetic in between.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import refine_fast as rf

from ...errors import RefineFastError
from ...ops.lerp import lerp_
from ..operation import DTYPES, Contender, Operation, Shape, Work

WEIGHT = 0.35
REST = 25
"""Seconds in which the host takes some 16 GB back."""
SWEEP = (0.1, 0.2, 0.35, 0.5, 0.8)
MERGEKIT = os.environ.get("REFINE_FAST_MERGEKIT", "mergekit-yaml")
STATE = {"warm": "warm", "cold": "cold", "in use": "cold, memory in use"}


@dataclass
class Pair:
    """A folder with ``base`` and ``tuned``, and ``out`` once a contender ran."""

    root: Path
    mode: str

    @property
    def out(self) -> Path:
        """Where the fused model goes."""
        return self.root / "out"


def make_model(folder: Path, gigabytes: float, shards: int, dtype: torch.dtype, seed: int) -> None:
    """A Qwen2 (mergekit merges what it knows the names of) of as many layers as come to that
    size."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    width = 2048 if gigabytes > 1 else 768 if gigabytes > 0.2 else 256
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 256),
        "vocab_size": 32_000 if gigabytes > 0.05 else 1_000,
        "tie_word_embeddings": True,
    }

    def model(layers: int) -> Qwen2ForCausalLM:
        return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **sizes))  # type: ignore[arg-type]

    with torch.device("meta"):
        empty, one = (
            sum(p.numel() for p in model(layers).parameters()) * dtype.itemsize for layers in (0, 1)
        )
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        made = model(max(1, round((gigabytes * 1e9 - empty) / (one - empty))))
    finally:
        torch.set_default_dtype(torch.float32)
    made.save_pretrained(folder, max_shard_size=int(1.03 * gigabytes * 1e9 / shards) + 1)


@contextmanager
def pair(shape: Shape, dtype: str, device: str, *, mode: str) -> Iterator[Pair]:
    """Two random models of that size, in a folder under TMPDIR: 4 times the size of disk."""
    with tempfile.TemporaryDirectory(prefix="refine-fast-bench-") as folder:
        gigabytes, shards = float(shape["gb"]), int(shape["shards"])
        if shutil.disk_usage(folder).free < 4.5e9 * gigabytes:
            raise RefineFastError(
                f"fuse: {folder} has no room for three models of {gigabytes:g} GB; "
                "set TMPDIR to a larger disk, or give a smaller --shape gb=."
            )
        for seed, name in enumerate(("base", "tuned")):
            make_model(Path(folder) / name, gigabytes, shards, DTYPES[dtype], seed)
        yield Pair(Path(folder), mode)


def flush(folder: Path) -> None:
    """Waits until every file is on the disk."""
    for path in folder.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def use_memory() -> None:
    """Writes to all memory that is free, but for 1 GB."""
    found = re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    size = max(int(found[0]) * 1024 - 10**9, mmap.PAGESIZE)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    torch.frombuffer(area, dtype=torch.uint8)[:: mmap.PAGESIZE] = 1


def prepare(models: Pair) -> None:
    """Removes the previous output; loads the inputs into the page cache or evicts them from it."""
    shutil.rmtree(models.out, ignore_errors=True)
    for path in (*(models.root / "base").iterdir(), *(models.root / "tuned").iterdir()):
        with path.open("rb") as file:
            if models.mode == STATE["warm"]:
                while file.read(1 << 24):
                    pass
            else:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.sync()
    if models.mode == STATE["cold"]:
        time.sleep(REST)
    elif models.mode == STATE["in use"]:
        use_memory()


def copy(models: Pair) -> Path:
    """``cp`` of base."""
    subprocess.run(["cp", "-r", models.root / "base", models.out], check=True)
    flush(models.out)
    return models.out


def fused(models: Pair) -> Path:
    """Ours."""
    rf.fuse(models.root / "base", models.root / "tuned", models.out, WEIGHT)
    return models.out


def sweep(models: Pair) -> Path:
    """Five outputs in one read."""
    models.out.mkdir()
    outs = {weight: models.out / str(weight) for weight in SWEEP}
    rf.fuse_sweep(models.root / "base", models.root / "tuned", outs)
    return outs[WEIGHT]


def loop(models: Pair) -> Path:
    """safetensors and torch.lerp, tensor by tensor."""
    models.out.mkdir()
    for path in (models.root / "base").glob("*.safetensors"):
        tuned_path = models.root / "tuned" / path.name
        with safe_open(path, "pt") as base, safe_open(tuned_path, "pt") as tuned:
            merged = {
                name: torch.lerp(base.get_tensor(name), tuned.get_tensor(name), WEIGHT)
                for name in base.keys()  # noqa: SIM118
            }
        save_file(merged, models.out / path.name, {"format": "pt"})
    flush(models.out)
    return models.out


def lm_cocktail(models: Pair) -> Path:
    """Whole state dicts in float32."""
    models.out.mkdir()
    states: list[dict[str, torch.Tensor]] = [{}, {}]
    for state, folder in zip(states, ("base", "tuned"), strict=True):
        for path in (models.root / folder).glob("*.safetensors"):
            state |= {name: t.float() for name, t in load_file(path).items()}
    merged = {name: (1 - WEIGHT) * t + WEIGHT * states[1][name] for name, t in states[0].items()}
    save_file(merged, models.out / "model.safetensors", {"format": "pt"})
    flush(models.out)
    return models.out


def stored_dtype(models: Pair) -> str:
    """torch's name of the type of base's tensors."""
    with safe_open(next((models.root / "base").glob("*.safetensors")), "pt") as shard:
        stored = shard.get_slice(next(iter(shard.keys()))).get_dtype()
    return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[stored]


def mergekit(models: Pair) -> Path:
    """mergekit-yaml in a process of its own, as its users run it."""
    entries = [
        {"model": str(models.root / name), "parameters": {"weight": w}}
        for name, w in (("base", 1 - WEIGHT), ("tuned", WEIGHT))
    ]
    recipe = models.root / "mergekit.yaml"
    rule = {"models": entries, "merge_method": "linear", "dtype": stored_dtype(models)}
    recipe.write_text(json.dumps(rule))
    options = ["--no-copy-tokenizer", "--no-write-model-card"]
    subprocess.run([MERGEKIT, recipe, models.out, *options], check=True, capture_output=True)
    flush(models.out)
    return models.out


def merge_and_save(merge: Callable[..., Any], models: Pair) -> Path:
    """In float32, as is the default of both, then in the type of the inputs."""
    merged = merge(
        [str(models.root / "base"), str(models.root / "tuned")],
        parameters={"weight": [1 - WEIGHT, WEIGHT]},
        out_dtype=stored_dtype(models),
        local_files_only=True,
    )
    merged.save_pretrained(str(models.out), create_model_card=False)
    flush(models.out)
    return models.out


def their_merge(models: Pair) -> Path:
    """SentenceTransformer.merge, over mergekit."""
    from sentence_transformers import SentenceTransformer

    return merge_and_save(SentenceTransformer.merge, models)


def our_merge(models: Pair) -> Path:
    """Ours with its signature."""
    from refine_fast.integrations.sentence_transformers import merge

    return merge_and_save(merge, models)


def huge_pages(size: int) -> memoryview:
    """Memory in pages of 2 MiB: from small ones, all over physical memory, a virtual disk moves a
    third as much."""
    page = 2 << 20
    area = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(area)) % page
    return memoryview(area)[begin : begin + size]


def device(models: Pair) -> Path:
    """Reads both inputs and writes an output's bytes past the page cache, all at once."""
    models.out.mkdir()
    names = sorted(path.name for path in (models.root / "base").glob("*.safetensors"))
    sizes = [(models.root / "base" / name).stat().st_size for name in names]

    def move(folder: Path, flags: int, call: Callable[[int, list[memoryview], int], int]) -> None:
        window = huge_pages(8 << 20)
        for name, size in zip(names, sizes, strict=True):
            fd = os.open(folder / name, flags | os.O_DIRECT)
            if flags & os.O_CREAT:
                os.posix_fallocate(fd, 0, size)
            for offset in range(0, size, len(window)):
                call(fd, [window], offset)
            os.fsync(fd)
            os.close(fd)

    with ThreadPoolExecutor(3) as threads:
        moves = [
            threads.submit(move, models.root / "base", os.O_RDONLY, os.preadv),
            threads.submit(move, models.root / "tuned", os.O_RDONLY, os.preadv),
            threads.submit(move, models.out, os.O_WRONLY | os.O_CREAT, os.pwritev),
        ]
    for done in moves:
        done.result()
    return models.out


def weights_of(folder: Path) -> torch.Tensor:
    """Every tensor of a folder in the order of its name, flat in float32; a shard or a model that
    wrote nothing gives none."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.rglob("*.safetensors"):
        tensors |= load_file(path)
    names = sorted(tensors, key=lambda name: name.removeprefix("0.auto_model."))
    return torch.cat([tensors[name].float().flatten() for name in names])


def work(shape: Shape, dtype: str) -> Work:
    """Two models read, one written; three operations an element."""
    size = float(shape["gb"]) * 1e9
    return Work(3 * size / DTYPES[dtype].itemsize, 3 * size)


@contextmanager
def tensors(
    shape: Shape, dtype: str, device: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """base, tuned and a copy of base to work in."""
    count = int(float(shape["gb"]) * 1e9) // DTYPES[dtype].itemsize
    generator = torch.Generator().manual_seed(0)
    base, tuned = (
        torch.randn(count, generator=generator).to(device, DTYPES[dtype]) for _ in range(2)
    )
    yield base, tuned, base.clone()


def lerped(inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Ours, in place; the copy that both contenders make first is part of both."""
    base, tuned, out = inputs
    lerp_(out.copy_(base), tuned, WEIGHT)
    return out


def torch_lerp(inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """torch's, in place."""
    base, tuned, out = inputs
    return out.copy_(base).lerp_(tuned, WEIGHT)


CONTENDERS = (
    Contender("refine_fast", fused, "streamed, flushed"),
    Contender("cp", copy, "a copy of one model, flushed", exact=False),
    Contender("loop", loop, "safetensors + torch.lerp, tensor by tensor"),
    Contender("lm_cocktail", lm_cocktail, "whole state dicts in float32", slow=True, exact=False),
    Contender(
        "mergekit", mergekit, "mergekit-yaml, linear", command=MERGEKIT, slow=True, exact=False
    ),
    Contender(
        "sentence_transformers",
        their_merge,
        "SentenceTransformer.merge, over mergekit",
        needs="mergekit",
        slow=True,
        exact=False,
    ),
    Contender(
        "refine_fast_merge",
        our_merge,
        "our merge in its place",
        needs="mergekit",
        slow=True,
        exact=False,
    ),
    Contender(
        "device", device, "the disk's floor: the same bytes past the page cache", exact=False
    ),
)
LARGE = {"gb": 3.15, "shards": 3}

WARM = Operation(
    "fuse",
    STATE["warm"],
    shape={"gb": 0.44, "shards": 1},
    quick={"gb": 0.12},
    tiny={"gb": 0.004},
    full=({"gb": 0.12}, {"gb": 1.0}),
    dtypes=("fp32", "bf16", "fp16"),
    contenders=(
        *CONTENDERS,
        Contender("refine_fast_sweep_5", sweep, "five outputs in one read", slow=True, exact=False),
    ),
    peer="cp",
    floor="device",
    inputs=partial(pair, mode=STATE["warm"]),
    work=work,
    result=weights_of,
    before=prepare,
    needs="transformers",
)
OPERATIONS = (
    WARM,
    Operation(
        "fuse",
        "lerp",
        shape={"gb": 0.2},
        quick={"gb": 0.05},
        tiny={"gb": 0.0001},
        check={"gb": 0.001},
        check_peer="torch.lerp",
        dtypes=("fp32", "bf16", "fp16"),
        contenders=(
            Contender("refine_fast", lerped, "the arithmetic alone, in place, in memory"),
            Contender("torch.lerp", torch_lerp, "base.lerp_(tuned, weight)"),
        ),
        peer="torch.lerp",
        inputs=tensors,
        work=work,
        by_default=False,
    ),
    *(
        replace(
            WARM,
            mode=mode,
            shape=LARGE,
            dtypes=("bf16", "fp32", "fp16"),
            contenders=CONTENDERS,
            full=(),
            rounds=3,
            inputs=partial(pair, mode=mode),
            by_default=False,
        )
        for mode in (STATE["cold"], STATE["in use"])
    ),
)
