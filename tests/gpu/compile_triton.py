"""Compiles every Triton kernel for sm_75, sm_80 and sm_90 with no GPU and prints what came out, one
JSON object a line; run by test_compile.py in a process of its own, since Triton decides at import
whether its kernels are interpreted."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from refine_fast.triton_kernels import info_nce, info_nce_kernels, info_nce_plan

INTS = {
    "B": "i32",
    "N": "i32",
    "D": "i32",
    "K": "i32",
    "tiles_n": "i32",
    "tiles_per_split": "i32",
    "splits": "i32",
}
POINTERS = {
    **dict.fromkeys(("positives",), "*i64"),
    **dict.fromkeys(("row_id", "col_id", "order", "starts"), "*i32"),
    **dict.fromkeys(("hard_mask",), "*i1"),
    **dict.fromkeys(("wide",), "*i8"),
}
# what is in none of them is float32
INPUTS, WEIGHTS, GRADIENTS = {"q", "d", "hard"}, {"e", "scaled_q"}, {"dq", "dd", "dhard", "extra"}


def argument_type(name: str, dtype: str) -> str:
    if name == "margin":
        return "fp32"
    if name in INTS or name.startswith("stride"):
        return INTS.get(name, "i32")
    # what is bf16, what fp16
    halves = {
        "bf16": (INPUTS | WEIGHTS | GRADIENTS, set()),
        "fp16": (WEIGHTS, INPUTS),
        "fp32": (set(), set()),
    }
    in_bf16, in_fp16 = halves[dtype]
    return POINTERS.get(name) or (
        "*bf16" if name in in_bf16 else "*fp16" if name in in_fp16 else "*fp32"
    )


def compile_kernel(
    name: str,
    dtype: str,
    capability: int,
    constants: dict[str, object],
    options: dict[str, int],
    unaligned: tuple[str, ...] = (),
) -> dict[str, object]:
    kernel = getattr(info_nce_kernels, name)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        arg: "constexpr" if arg in constants else argument_type(arg, dtype)
        for arg in kernel.arg_names
    }
    multiples = [
        i
        for i, (arg, kind) in enumerate(signature.items())
        if (kind[0] == "*" or arg.startswith("stride") or arg == "D") and arg not in unaligned
    ]
    aligned = {(i,): [["tt.divisibility", 16]] for i in multiples}
    built = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    ptx = built.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {
        "kernel": name,
        "dtype": dtype,
        "capability": capability,
        "constants": constants,
        "shared": built.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "async_copies": ptx.count("cp.async"),
        "narrow_stores": len(re.findall(r"st\.global(?:\.v2)?\.b(?:16|32)", ptx)),
    }


FLAGS = ("NORMALIZE", "MARGIN", "HARD_MASK", "SUMMED", "EXTRA", "EVEN_K")
FORMS = {
    "every option": dict.fromkeys(FLAGS, True),
    # an absent tensor is None and an integer of 1 a constant in Triton's eyes: both are programs of
    # their own
    "no option": dict.fromkeys(FLAGS, False)
    | dict.fromkeys(("hard_mask", "tile_sums", "extra"), None),
    "ones": dict.fromkeys(FLAGS, True) | dict.fromkeys(INTS.keys() - {"D"}, 1),
    # for the tile kernels alone: rows of 16-bit numbers that begin anywhere
    "odd D": dict.fromkeys(FLAGS, True) | {"EVEN_K": False},
}
ODD_D = ("q", "d", "D", "stride_q", "stride_d")
"""The arguments that are then no multiples of 16."""


def main() -> None:
    # sm_75 has no bf16
    everything = [(75, "fp16"), (75, "fp32"), (80, "bf16"), (80, "fp32"), (90, "fp32")]
    for capability, dtype, form in [
        *((*target, "every option") for target in everything),
        *((90, "bf16", form) for form in FORMS),
    ]:
        tile = info_nce_plan.tiling(
            (capability // 10, capability % 10), 4 if dtype == "fp32" else 2
        )
        constants = FORMS[form] | {
            "PRECISION": "tf32x3",
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
        }
        constants |= {"BLOCK_D": 1024, "BLOCK_T": 256, "BLOCK": info_nce.COMBINE_BLOCK}
        for name in ("negatives_kernel", "weights_kernel"):
            built = compile_kernel(
                name,
                dtype,
                capability,
                constants,
                {"num_warps": tile.warps, "num_stages": tile.stages},
                ODD_D if form == "odd D" else (),
            )
            print(json.dumps(built | {"form": form}), flush=True)
        if form == "odd D":
            continue
        for name in (
            "prepare_kernel",
            "combine_kernel",
            "rows_kernel",
            "finish_rows_kernel",
            "finish_cols_kernel",
        ):
            print(
                json.dumps(
                    compile_kernel(name, dtype, capability, constants, {"num_warps": 4})
                    | {"form": form}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
