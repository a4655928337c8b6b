"""What a merge did, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorChange:
    """What a merge did to one tensor.

    ``weight``: the weight applied; ``norm``: Frobenius norm of out - base; ``relative``: that over
    base's norm (0 for a base of zeros that did not change); ``not_finite``: how many values of out
    are NaN or infinite.
    """

    weight: float
    norm: float
    relative: float
    not_finite: int


@dataclass(frozen=True)
class FuseReport:
    """The outcome of one merge.

    ``tensors``: every floating-point tensor, by name (prefixed by its folder unless that is the
    root); ``copied``: integer and bool tensors, copied from base; ``unequal``: those of them that
    differ in tuned; ``reconciled``: what was matched, kept or not read; ``differences``: what
    differs around the tensors (the output has base's files); ``left_out``: base's files that may
    hold weights and were not fused (other formats, copies, a trainer's states); ``sha256``: path
    -> digest of every weight file read or written, with ``checksum``; ``resumed``: bytes that an
    earlier, killed run had already written.
    """

    out: Path
    tensors: dict[str, TensorChange]
    copied: list[str]
    unequal: list[str]
    reconciled: list[str]
    differences: list[str]
    left_out: list[str]
    bytes_read: int
    bytes_written: int
    seconds: float
    resumed: int = 0
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def not_finite(self) -> list[str]:
        """The tensors that hold NaN or infinite values."""
        return [name for name, change in self.tensors.items() if change.not_finite]

    def __str__(self) -> str:
        read, written = self.bytes_read / 1e9, self.bytes_written / 1e9
        rate = (read + written) / max(self.seconds, 1e-9)
        lines = [
            f"{self.out}: {len(self.tensors)} tensors fused, {len(self.copied)} copied;"
            f" {read:.2f} GB read, {written:.2f} GB written in {self.seconds:.1f} s"
            f" ({rate:.2f} GB/s)"
        ]
        lines += [f"  note: {note}" for note in self.reconciled]
        lines += [f"  differs: {difference}" for difference in self.differences]
        lines += [f"  left out: {name}" for name in self.left_out]
        lines += [f"  differs in tuned, copied from base: {name}" for name in self.unequal]
        lines += [
            f"  NaN or infinite: {name} ({self.tensors[name].not_finite} values)"
            for name in self.not_finite
        ]
        lines += [f"  sha256 {digest}  {name}" for name, digest in self.sha256.items()]
        return "\n".join(lines)
