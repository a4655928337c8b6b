"""Memory that runs out inside an operation, on whichever thread, is a MemoryError, and the process
goes on."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The address space is limited, a little less each time, until the first call that succeeds: so each
# allocation of a large call fails once. Before that a small one imports what it needs, and threads
# start: OpenMP ends a process that gets none.
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
import refine_fast as rf

torch.set_num_threads(2)
torch.manual_seed(0)
q, d = torch.randn(3000, 384, requires_grad=True), torch.randn(3000, 384)
wide = torch.randn(1000, 2048, requires_grad=True)
large, docs = torch.randn(1000, 64), torch.randn(8_000, 64)
operations = {
    "info_nce": lambda n: rf.info_nce(q[:n], d, normalize=True),
    "info_nce bf16": lambda n: rf.info_nce(wide[:n].bfloat16(), wide.bfloat16(), normalize=True),
    "symmetric": lambda n: rf.info_nce(q[:n], d[:n], normalize=True, symmetric=True),
    "band_topk": lambda n: rf.band_topk(large[:n], docs, 20, band=(-1, 1), normalize=True).ids,
    "best_of_groups": lambda n: rf.best_of_groups(q[:n], d, torch.arange(0, 3001, 3)),
}
call = operations[sys.argv[1]]
call(4), torch.randn(1_000_000).exp()
failed, found, room = 0, None, 0
while found is None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    try:
        found = call(1000)
    except MemoryError as error:
        assert "no memory for the working buffers" in str(error), error
        failed += 1
    except RuntimeError as error:  # torch's own allocation of a result
        assert "memory" in str(error), error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    room += 1 << 19
assert torch.equal(call(1000), found)
print(failed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
@pytest.mark.parametrize(
    "operation", ["info_nce", "info_nce bf16", "symmetric", "band_topk", "best_of_groups"]
)
def test_memory_that_runs_out_is_an_error(operation: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, operation], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 0  # some call failed in the operation itself
