"""The operations in a forked child, as in a DataLoader worker. The parent's OpenMP threads do not
exist there, and the child must not wait for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

# torch itself hangs in the child when it runs an operation in parallel, so tensors are small enough
# for it to use one thread, while the kernels would use three.
SCRIPT = """
import multiprocessing, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import refine_fast as rf

torch.set_num_threads(3)
torch.manual_seed(0)
folder = Path(sys.argv[1])
q, d = torch.randn(40, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
queries, docs = torch.randn(40, 16), torch.randn(300, 16)
for name in ("base", "tuned"):
    save_file({"w": torch.randn(100, 10)}, folder / f"{name}.safetensors")


def compute(name):
    loss = rf.info_nce(q, d, normalize=True, reduction="none").detach()
    found = rf.band_topk(queries, docs, 5, band=(-0.5, 0.5), skip=2, normalize=True)
    out = folder / f"{name}.safetensors"
    rf.fuse(folder / "base.safetensors", folder / "tuned.safetensors", out, 0.35)
    return [t.tolist() for t in (loss, found.ids, found.scores, load_file(out)["w"])]


torch.randn(512, 512) @ torch.randn(512, 512)  # torch's threads are running, and so are ours
before = compute("before")
with multiprocessing.get_context("fork").Pool(2) as pool:
    children = pool.map(compute, ["one", "two"], chunksize=1)
assert children == [before, before], "the children differ"
assert compute("after") == before, "the parent differs"
torch.randn(512, 512) @ torch.randn(512, 512)
"""


def test_forked_children_compute_the_same(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(
            timeout=180
        )  # for a child that hangs; the work takes a few seconds
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the children that hang
    assert process.returncode == 0, errors
