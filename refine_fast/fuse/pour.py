"""Files into the memory of a device: reading, copying to the GPU and computing there overlap.

A lane is a pinned buffer, its twin on the GPU and a stream. Each chunk of work takes a free lane in a thread of its own: the thread reads
into the pinned buffer, and queues the copy and the kernel on the lane's stream. One thread reads a cached file slower than PCIe 5 takes it
(some 50 GB/s): several lanes keep the bus busy, and 8 MiB a chunk make the cost of a launch disappear. On the CPU the kernel runs in the
lane's thread, and torch's threads say how many there are: two fuse a cached model of 0.54 GB in 0.08 s, one in 0.13.

Not measured on a GPU yet. First to be tried where the bus waits: 16 lanes, if the reads are too slow; 16 MiB a chunk, if the lanes wait for
one another to run Python (here 30 us a chunk, the calls of CUDA not counted, where PCIe 5 takes 160 us).
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

BUFFER_BYTES = 8 << 20
LANES = 8


class Chunk(Protocol):
    def read(self, buffer: Tensor) -> int:
        """Fills a buffer of BUFFER_BYTES in CPU memory from its start; returns how many bytes."""
        ...

    def apply(self, buffer: Tensor) -> None:
        """Uses what was read, on the device, on torch's current stream."""
        ...


def pour(chunks: Iterable[Chunk], device: torch.device) -> None:
    """Reads and applies every chunk, in any order; work queued later on the current stream sees them all. The first exception is raised
    again when the chunks in progress have ended."""
    on_gpu = device.type == "cuda"
    lanes: SimpleQueue[tuple[Tensor, Tensor, torch.cuda.Stream | None]] = SimpleQueue()
    streams = [torch.cuda.Stream(device) if on_gpu else None for _ in range(LANES if on_gpu else min(LANES, torch.get_num_threads()))]
    for stream in streams:
        host = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        lanes.put((host, torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device) if on_gpu else host, stream))
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))

    def run(chunk: Chunk) -> None:
        host, there, stream = lane = lanes.get()
        try:
            if stream is not None:
                stream.synchronize()  # the lane's last copy has left the pinned buffer
            used = chunk.read(host)
            with torch.cuda.stream(stream):
                if stream is not None:
                    there[:used].copy_(host[:used], non_blocking=True)
                chunk.apply(there)
        finally:
            lanes.put(lane)

    try:
        with ThreadPoolExecutor(len(streams)) as pool:
            for _ in pool.map(run, chunks):
                pass
    finally:
        for stream in streams:
            if stream is not None:
                stream.synchronize()  # before the buffers go back to the allocator
