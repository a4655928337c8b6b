"""What a test runs an operation over; the fixtures that choose it are in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Backend:
    """One way to run an operation: its name, the device of its inputs, and ``emulate(processors,
    shared_bytes, order)``, which configures an emulated GPU and does nothing elsewhere."""

    name: str
    device: torch.device
    emulate: Callable[[int, int, int], object] = lambda *_: None


class OnGPU(torch.Tensor):
    """A CPU tensor that says that it is on a GPU; made by ``as_subclass``."""

    is_cpu, is_cuda, device = False, True, torch.device("cuda")
