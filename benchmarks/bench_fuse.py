"""fuse beside its peers: ``python benchmarks/bench_fuse.py --help``.

Every contestant writes one fused model and flushes it to the disk; ``cp`` copies one of the two inputs and flushes it: fusing two models
should cost no more than copying one. "cold": the inputs are dropped from the page cache before each run; "warm": they are read once before.
Disks drift more than anything else (a virtual one by what its host still holds: 1.0 to 2.6 GB/s in one minute), so each round starts with
another contestant; look at the ratios, each within one run. The peers do what their users run:

- loop: safetensors' ``safe_open`` and ``torch.lerp`` tensor by tensor, a shard saved at a time;
- lm_cocktail: the arithmetic of LM_Cocktail.mix_models, ``sum(weight * state_dict[name])`` over whole state dicts in float32;
- mergekit: method linear, in an environment of its own, where one is given.

"device" is no merge but the floor under one: the bytes of both inputs read and those of the output written, all past the page cache and at
once, with no arithmetic in between.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import record
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import refine_fast as rf

WEIGHT = 0.35
SWEEP = (0.1, 0.2, 0.35, 0.5, 0.8)
COLUMNS = 2048


def make_model(folder: Path, gigabytes: float, shards: int, dtype: torch.dtype, seed: int) -> None:
    """A decoder-like stack of matrices of 2048 columns, every seventh four times as tall."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(seed)
    weight_map, layer = {}, 0
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        rows, content = int(gigabytes * 1e9 / shards / dtype.itemsize / COLUMNS), {}
        while rows > 0:
            height = min(rows, COLUMNS * (4 if layer % 7 == 0 else 1))
            content[f"layers.{layer}.weight"] = torch.randn(height, COLUMNS, generator=g).to(dtype)
            rows, layer = rows - height, layer + 1
        save_file(content, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(content, name)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2Model"]}')


def flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def prepare(root: Path, cold: bool) -> None:
    """Removes the output of the run before and puts the inputs into the page cache, or out of it."""
    shutil.rmtree(root / "out", ignore_errors=True)
    for path in (*(root / "base").iterdir(), *(root / "tuned").iterdir()):
        with path.open("rb") as file:
            if cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass
    os.sync()


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
            merged = {name: torch.lerp(base.get_tensor(name), tuned.get_tensor(name), WEIGHT) for name in base.keys()}  # noqa: SIM118
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


def mergekit(command: str, root: Path) -> None:
    models = [{"model": str(root / name), "parameters": {"weight": w}} for name, w in (("base", 1 - WEIGHT), ("tuned", WEIGHT))]
    recipe = root / "mergekit.yaml"
    dtype = {2: "bfloat16", 4: "float32"}[next(iter(load_file(next((root / "base").glob("*.safetensors"))).values())).dtype.itemsize]
    recipe.write_text(json.dumps({"models": models, "merge_method": "linear", "dtype": dtype}))
    subprocess.run([command, recipe, root / "out", "--copy-tokenizer", "--no-write-model-card"], check=True, capture_output=True)
    flush(root / "out")


def device(root: Path) -> None:
    (root / "out").mkdir()
    names = sorted(path.name for path in (root / "base").glob("*.safetensors"))
    moves = [([root / folder / name for name in names], os.O_RDONLY, os.preadv) for folder in ("base", "tuned")]
    moves.append(([root / "out" / name for name in names], os.O_WRONLY | os.O_CREAT, os.pwritev))
    sizes = [(root / "base" / name).stat().st_size for name in names]

    def move(paths: list[Path], flags: int, call: Callable[[int, list[mmap.mmap], int], int]) -> None:
        window = mmap.mmap(-1, 8 << 20)
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
    prepare(root, cold=True)
    return partial(run, root)


def compare(
    root: Path, contestants: dict[str, Callable[[Path], None]], *, cold: bool, rounds: int, dtype: str, shape: dict[str, object]
) -> None:
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for i in range(len(contestants)):
            name, run = list(contestants.items())[(turn + i) % len(contestants)]
            prepare(root, cold)
            samples[name].append(record.sample(partial(run, root)))
    mode = "cold" if cold else "warm"
    record.save(record.rows(samples, op="fuse", mode=mode, dtype=dtype, shape=shape, metric="seconds", peer="cp"))
    if cold:
        peaks = {name: [record.peak_mb(partial(build, contestants[name], root))] for name in ("refine_fast", "loop") if name in contestants}
        record.save(record.rows(peaks, op="fuse", mode=mode, dtype=dtype, shape=shape, metric="peak_mb", peer="loop"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=3.15, help="size of each bf16 input of the cold run, in three shards")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work: 4 times --gb of disk, and 6 times --gb of memory for lm_cocktail")
    parser.add_argument("--skip", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--mergekit", help="the mergekit-yaml command of an environment that has it")
    arguments = parser.parse_args()
    contestants: dict[str, Callable[[Path], None]] = {
        "cp": copy,
        "refine_fast": fuse,
        "device": device,
        "loop": loop,
        "lm_cocktail": lm_cocktail,
    }
    if arguments.mergekit:
        contestants["mergekit"] = partial(mergekit, arguments.mergekit)
    contestants = {name: run for name, run in contestants.items() if name not in arguments.skip}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        for seed, name in enumerate(("base", "tuned")):
            make_model(large / name, arguments.gb, 3, torch.bfloat16, seed)
            make_model(small / name, 0.44, 1, torch.float32, seed)
        shape: dict[str, object] = {"gb": arguments.gb, "shards": 3}
        compare(large, contestants, cold=True, rounds=arguments.rounds, dtype="bf16", shape=shape)
        del contestants["device"]
        contestants["refine_fast_sweep_5"] = sweep
        compare(small, contestants, cold=False, rounds=arguments.rounds, dtype="fp32", shape={"gb": 0.44, "shards": 1})


if __name__ == "__main__":
    main()
