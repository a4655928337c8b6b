def lerp(
    base: int, base_type: int, tuned: int, tuned_type: int, n: int, weight: float, stream: int
) -> None: ...

class BandSearch:
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
        block: int,
    ) -> None: ...
    def bytes(self, rows: int) -> int: ...
    def begin(
        self, first: int, rows: int, hi: int, offsets: int, ids: int, workspace: int, stream: int,
        queries: int, dtype: int, row_stride: int,
    ) -> None: ...  # fmt: skip
    def push(self, docs: int, dtype: int, row_stride: int, rows: int, first_id: int) -> None: ...
    def finish(self, ids: int, scores: int, in_band: int) -> None: ...
    def finish_part(
        self, ids: int, scores: int, drawn_ids: int, drawn_scores: int, above: int, in_band: int
    ) -> None: ...
