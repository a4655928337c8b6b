from collections.abc import Callable

def isa() -> str: ...
def force_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def matmul(
    a: int,
    a_row: int,
    a_k: int,
    b: int,
    b_col: int,
    b_k: int,
    m: int,
    n: int,
    k: int,
    bf16: bool,
    out: int,
) -> None: ...
def lerp(base: int, base_type: int, tuned: int, tuned_type: int, n: int, weight: float) -> None: ...
def stream(
    files: list[tuple[int, bytes]],
    pieces: list[tuple[int, int, int, int, int, int, int, int, int]],
    factors: list[tuple[int, int, int, int, int]],
    outputs: list[tuple[int, bytes, int, list[float]]],
    overlap: bool,
    on_block: Callable[[int, int, memoryview], None],
) -> list[list[tuple[float, float, int, int]]]: ...
def preallocate(fd: int, name: bytes, size: int) -> None: ...
def exchange_paths(a: bytes, b: bytes) -> bool: ...

class BandSpec:
    def __init__(
        self,
        d: int,
        k: int,
        skip: int,
        lo: float,
        random: bool,
        seed: int,
        band_first: bool,
        normalize: bool,
        threads: int,
        largest: int = 1,
    ) -> None: ...

class BandSearch:
    @staticmethod
    def queries_within(spec: BandSpec, bytes: int) -> int: ...
    def __init__(
        self, spec: BandSpec, first: int, rows: int, hi: int, offsets: int, ids: int
    ) -> None: ...
    def set_queries(self, queries: int, dtype: int, row_stride: int) -> None: ...
    def push(
        self, docs: int, dtype: int, row_stride: int, count: int, first_id: int, offsets: int = 0
    ) -> None: ...
    def finish(self, ids: int, scores: int, in_band: int) -> None: ...
    def finish_part(
        self, ids: int, scores: int, drawn_ids: int, drawn_scores: int, above: int, in_band: int
    ) -> None: ...

def best_of_groups(
    queries: int,
    count: int,
    d: int,
    rows: int,
    dtype: int,
    row_stride: int,
    offsets: int,
    groups: int,
    best: int,
    best_stride: int,
    threads: int,
) -> None: ...
def info_nce(
    q: int, d: int, hard: int, positives: int, doc_ids: int, hard_mask: int, coefficients: int,
    rows: int, columns: int, width: int, hards: int, prefixes: list[int],
    prefix_weights: list[float], dtype: int, temperature: float, margin: float, symmetric: bool,
    normalize: bool, threads: int, loss: int, grad_q: int, grad_d: int, grad_hard: int,
    grad_temperature: int,
) -> None: ...  # fmt: skip

class StageScope:
    def __init__(self, name: str) -> None: ...
    def close(self) -> None: ...

def start_stages(capacity: int) -> None: ...
def stop_stages() -> tuple[
    list[tuple[str, int, int]], list[tuple[str, int, int, int]], int
]: ...  # fmt: skip
