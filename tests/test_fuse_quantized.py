"""fuse refuses codes that have scales of their own; numbers of 8 bits without any are fused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import refine_fast as rf
from refine_fast.errors import RefineFastError
from refine_fast.fuse import fuse_into

FP8, CODES, SCALES = (
    torch.ones(4, 4).to(torch.float8_e4m3fn),
    torch.ones(4, 4, dtype=torch.int8),
    torch.ones(4),
)
QUANTIZED = {
    "FP8": {"l.weight": FP8, "l.weight_scale": SCALES},
    "FP8 in blocks": {"l.weight": FP8, "l.weight_scale_inv": SCALES},
    "FP8, the scale below": {"l.weight": FP8, "l.weight.scale": SCALES},
    "compressed-tensors": {
        "l.weight_packed": CODES.int(), "l.weight_scale": SCALES.bfloat16(),
        "l.weight_shape": torch.tensor([4, 32]),
    },
    "GPTQ, AWQ": {"l.qweight": CODES.int(), "l.scales": SCALES.half(), "l.qzeros": CODES.int()},
    "bitsandbytes, 8 bits": {"l.weight": CODES, "l.SCB": SCALES},
    "bitsandbytes, 4 bits": {"l.weight": CODES.byte(), "l.weight.absmax": SCALES},
    "MXFP4": {"l.up_blocks": CODES.byte(), "l.up_scales": torch.ones(4, dtype=torch.uint8)},
    "quanto": {"l.weight._data": CODES, "l.weight._scale": SCALES},
}  # fmt: skip


def pair(folder: Path, content: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    """The codes are the same in both, the scales are not."""
    tuned = {name: t + 1 if t.dtype == torch.float32 else t for name, t in content.items()}
    for name, tensors in (("base", content), ("tuned", tuned)):
        save_file(tensors, folder / f"{name}.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


@pytest.mark.parametrize("case", QUANTIZED)
def test_codes_with_scales_are_refused(tmp_path: Path, case: str) -> None:
    base, tuned = pair(tmp_path, QUANTIZED[case])
    model = nn.ModuleDict({"l": nn.Linear(4, 4, bias=False)})
    weight = model["l"].weight.detach().clone()
    said = "with scales in 'l.*': dequantize the model and save it again"
    with pytest.raises(RefineFastError, match=said):
        rf.fuse(base, tuned, tmp_path / "out.safetensors", force=True)
    with pytest.raises(RefineFastError, match=said):
        fuse_into(model, tuned)
    assert torch.equal(model["l"].weight, weight)
    assert not (tmp_path / "out.safetensors").exists()
    save_file({"l.weight": torch.ones(4, 4)}, base)  # either side
    for sides in ((base, tuned), (tuned, base)):
        with pytest.raises(RefineFastError, match=said):
            rf.fuse(*sides, tmp_path / "out.safetensors")


def test_what_only_resembles_codes_is_fused(tmp_path: Path) -> None:
    """A buffer of positions or of a mask beside a scale that is a parameter, FP8 without scales."""
    content = {
        "norm.scale": SCALES, "norm.position_ids": torch.arange(4),
        "norm.mask": torch.ones(4, dtype=torch.bool), "l.weight": FP8, "l.logit_scale": SCALES + 1,
    }  # fmt: skip
    report = rf.fuse(*pair(tmp_path, content), tmp_path / "out.safetensors")
    assert report.tensors["norm.scale"].norm > 0
