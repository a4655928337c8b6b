"""fuse beside its peers: ``python benchmarks/bench_fuse.py --help``.
 Every contestant writes one fused model and flushes it to the disk; ``cp`` copies one of the two
inputs and flushes it: fusing two models should cost no more than copying one. "cold": the inputs
are dropped from the page cache before each run; "warm": they are read once before. Disks drift more
than anything else, so each round starts with another contestant; look at the ratios, each within
one run. So does memory: the host of a virtual machine takes free pages back, and who reads and
writes through the page cache waits for new ones. "cold" waits before each run until that is done,
as where a machine has been idle; before "cold, memory in use" all free memory is written to, as if
it were the machine's own.

The peers do what their users run:

- loop: safetensors' ``safe_open`` and ``torch.lerp`` tensor by tensor, a shard saved at a time;
- lm_cocktail: the arithmetic of LM_Cocktail.mix_models, ``sum(weight * state_dict[name])`` over
  whole state dicts in float32;
- mergekit: method linear, in an environment of its own, where one is given;
- sentence_transformers: ``SentenceTransformer.merge`` and ``save_pretrained``, where mergekit is
  installed; refine_fast_merge is our ``merge`` in its place.
 "device" is no merge but the floor under one: the bytes of both inputs read and those of the output
written, all past the page cache and at once, with no arithmetic in between.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import mmap
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import refine_fast as rf

WEIGHT = 0.35
IN_USE = "cold, memory in use"
REST = 25  # seconds in which the host takes some 16 GB back
IN_MEMORY = ("lm_cocktail", "mergekit", "sentence_transformers", "refine_fast_merge")
SWEEP = (0.1, 0.2, 0.35, 0.5, 0.8)


def make_model(folder: Path, gigabytes: float, shards: int, dtype: torch.dtype, seed: int) -> None:
    """A Qwen2 (mergekit merges what it knows the names of, and nothing else without a word) of as
    many layers as come to that size.
    """
    width = 2048 if gigabytes > 1 else 768
    heads = {
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "vocab_size": 32_000,
        "tie_word_embeddings": True,
    }

    def model(layers: int) -> Qwen2ForCausalLM:
        return Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, **heads
            )
        )

    with torch.device("meta"):
        empty, one = (
            sum(p.numel() for p in model(layers).parameters()) * dtype.itemsize for layers in (0, 1)
        )
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    try:
        made = model(round((gigabytes * 1e9 - empty) / (one - empty)))
    finally:
        torch.set_default_dtype(torch.float32)
    made.save_pretrained(folder, max_shard_size=int(1.03 * gigabytes * 1e9 / shards))


def flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def use_memory() -> None:
    """Writes to all memory that is free, but for 1 GB."""
    available = (
        int(re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    )
    area = mmap.mmap(
        -1, max(available - 10**9, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    torch.frombuffer(area, dtype=torch.uint8)[:: mmap.PAGESIZE] = 1


def prepare(root: Path, mode: str) -> None:
    """Removes the previous output; loads the inputs into the page cache or evicts them from it."""
    shutil.rmtree(root / "out", ignore_errors=True)
    for path in (*(root / "base").iterdir(), *(root / "tuned").iterdir()):
        with path.open("rb") as file:
            if mode == "warm":
                while file.read(1 << 24):
                    pass
            else:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.sync()
    if mode == "cold":
        time.sleep(REST)
    elif mode == IN_USE:
        use_memory()


def copy(root: Path) -> None:
    subprocess.run(["cp", "-r", root / "base", root / "out"], check=True)
    flush(root / "out")


def fuse(root: Path) -> None:
    rf.fuse(root / "base", root / "tuned", root / "out", WEIGHT)


def sweep(root: Path) -> None:
    (root / "out").mkdir()
    rf.fuse_sweep(root / "base", root / "tuned", {w: root / "out" / str(w) for w in SWEEP})


def loop(root: Path) -> None:
    (root / "out").mkdir()
    for path in (root / "base").glob("*.safetensors"):
        with safe_open(path, "pt") as base, safe_open(root / "tuned" / path.name, "pt") as tuned:
            merged = {
                name: torch.lerp(base.get_tensor(name), tuned.get_tensor(name), WEIGHT)
                for name in base.keys()  # noqa: SIM118
            }
        save_file(merged, root / "out" / path.name, {"format": "pt"})
    flush(root / "out")


def lm_cocktail(root: Path) -> None:
    (root / "out").mkdir()
    states: list[dict[str, torch.Tensor]] = [{}, {}]
    for state, folder in zip(states, ("base", "tuned"), strict=True):
        for path in (root / folder).glob("*.safetensors"):
            state |= {name: t.float() for name, t in load_file(path).items()}
    merged = {name: (1 - WEIGHT) * t + WEIGHT * states[1][name] for name, t in states[0].items()}
    save_file(merged, root / "out" / "model.safetensors", {"format": "pt"})
    flush(root / "out")


def stored_dtype(root: Path) -> str:
    """torch's name of the type of base's tensors."""
    with safe_open(next((root / "base").glob("*.safetensors")), "pt") as shard:
        stored = shard.get_slice(next(iter(shard.keys()))).get_dtype()
    return {"BF16": "bfloat16", "F32": "float32"}[stored]


def mergekit(command: str, root: Path) -> None:
    models = [
        {"model": str(root / name), "parameters": {"weight": w}}
        for name, w in (("base", 1 - WEIGHT), ("tuned", WEIGHT))
    ]
    recipe = root / "mergekit.yaml"
    rule = {"models": models, "merge_method": "linear", "dtype": stored_dtype(root)}
    recipe.write_text(json.dumps(rule))
    subprocess.run(
        [command, recipe, root / "out", "--no-copy-tokenizer", "--no-write-model-card"],
        check=True,
        capture_output=True,
    )
    flush(root / "out")


def merge_and_save(merge: Callable[..., Any], root: Path) -> None:
    """In float32, as is the default of both, then in the type of the inputs."""
    merged = merge(
        [str(root / "base"), str(root / "tuned")],
        parameters={"weight": [1 - WEIGHT, WEIGHT]},
        out_dtype=stored_dtype(root),
        local_files_only=True,
    )
    merged.save_pretrained(str(root / "out"), create_model_card=False)
    flush(root / "out")


def sentence_transformers(root: Path) -> None:
    from sentence_transformers import SentenceTransformer

    merge_and_save(SentenceTransformer.merge, root)


def refine_fast_merge(root: Path) -> None:
    from refine_fast.integrations.sentence_transformers import merge

    merge_and_save(merge, root)


def huge_pages(size: int) -> memoryview:
    """Memory in pages of 2 MiB: from small ones, all over physical memory, a virtual disk moves a
    third as much.
    """
    page = 2 << 20
    area = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(area)) % page
    return memoryview(area)[begin : begin + size]


def device(root: Path) -> None:
    (root / "out").mkdir()
    names = sorted(path.name for path in (root / "base").glob("*.safetensors"))
    moves = [
        ([root / folder / name for name in names], os.O_RDONLY, os.preadv)
        for folder in ("base", "tuned")
    ]
    moves.append(([root / "out" / name for name in names], os.O_WRONLY | os.O_CREAT, os.pwritev))
    sizes = [(root / "base" / name).stat().st_size for name in names]

    def move(
        paths: list[Path], flags: int, call: Callable[[int, list[memoryview], int], int]
    ) -> None:
        window = huge_pages(8 << 20)
        for path, size in zip(paths, sizes, strict=True):
            fd = os.open(path, flags | os.O_DIRECT)
            if flags & os.O_CREAT:
                os.posix_fallocate(fd, 0, size)
            for offset in range(0, size, len(window)):
                call(fd, [window], offset)
            os.fsync(fd)
            os.close(fd)

    threads = [threading.Thread(target=move, args=arguments) for arguments in moves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def build(run: Callable[[Path], None], root: Path) -> Callable[[], None]:
    prepare(root, "cold")
    return partial(run, root)


def compare(
    root: Path,
    contestants: dict[str, Callable[[Path], None]],
    *,
    mode: str,
    rounds: int,
    dtype: str,
    shape: dict[str, object],
) -> None:
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    whole = weight_bytes(root / "base")
    for turn in range(rounds):
        for i in range(len(contestants)):
            name, run = list(contestants.items())[(turn + i) % len(contestants)]
            prepare(root, mode)
            samples[name].append(record.sample(partial(run, root)))
            if (written := weight_bytes(root / "out")) < 0.99 * whole:
                raise SystemExit(f"{name} wrote {written:,} bytes of weights of {whole:,}")
    record.save(
        record.rows(
            samples, op="fuse", mode=mode, dtype=dtype, shape=shape, metric="seconds", peer="cp"
        )
    )
    if mode == "cold":
        peaks = {
            name: [record.peak_mb(partial(build, contestants[name], root))]
            for name in ("refine_fast", "loop", "sentence_transformers", "refine_fast_merge")
            if name in contestants
        }
        record.save(
            record.rows(
                peaks, op="fuse", mode=mode, dtype=dtype, shape=shape, metric="peak_mb", peer="loop"
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gb",
        type=float,
        default=3.15,
        help="size of each bf16 input of the cold run, in three shards",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to work: 4 times --gb of disk, and 6 times --gb of memory for lm_cocktail",
    )
    parser.add_argument("--skip", nargs="*", default=[], help="peers to leave out")
    parser.add_argument(
        "--mergekit", help="the mergekit-yaml command of an environment that has it"
    )
    arguments = parser.parse_args()
    contestants: dict[str, Callable[[Path], None]] = {
        "cp": copy,
        "refine_fast": fuse,
        "device": device,
        "loop": loop,
        "lm_cocktail": lm_cocktail,
    }
    if importlib.util.find_spec("mergekit") is None:
        print(
            "sentence_transformers is left out, since it merges through mergekit:"
            " pip install 'sentence-transformers[merge]'"
        )
    else:
        contestants["sentence_transformers"] = sentence_transformers
        contestants["refine_fast_merge"] = refine_fast_merge
    if arguments.mergekit:
        contestants["mergekit"] = partial(mergekit, arguments.mergekit)
    contestants = {name: run for name, run in contestants.items() if name not in arguments.skip}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        for seed, name in enumerate(("base", "tuned")):
            make_model(large / name, arguments.gb, 3, torch.bfloat16, seed)
            make_model(small / name, 0.44, 1, torch.float32, seed)
        shape: dict[str, object] = {"gb": arguments.gb, "shards": 3}
        compare(large, contestants, mode="cold", rounds=arguments.rounds, dtype="bf16", shape=shape)
        fast = {name: run for name, run in contestants.items() if name not in IN_MEMORY}
        compare(large, fast, mode=IN_USE, rounds=arguments.rounds, dtype="bf16", shape=shape)
        del contestants["device"]
        contestants["refine_fast_sweep_5"] = sweep
        compare(
            small,
            contestants,
            mode="warm",
            rounds=arguments.rounds,
            dtype="fp32",
            shape={"gb": 0.44, "shards": 1},
        )


if __name__ == "__main__":
    main()
