"""The arithmetic of fuse: torch.lerp's bits at every ISA level, in every storage type."""

from __future__ import annotations

import pytest
import torch

from refine_fast import _core, reference

FLOATS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 5,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# 0 and 1 must give an input back, the two sides of 1/2 take different formulas, the rest
# extrapolate
WEIGHTS = [0.0, 0.35, 0.49999999, 0.5, 0.65, 1.0, -0.25, 1.5]


def native(base: torch.Tensor, tuned: torch.Tensor, weight: float) -> torch.Tensor:
    out = base.clone()
    _core.lerp(
        out.data_ptr(),
        FLOATS[base.dtype],
        tuned.data_ptr(),
        FLOATS[tuned.dtype],
        out.numel(),
        weight,
    )
    return out


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """The same bits, any NaN standing for any other."""
    x, y = (t.view(BITS[t.dtype.itemsize]) for t in (a, b))
    wrong = (x != y) & ~(a.double().isnan() & b.double().isnan())
    assert not wrong.any(), f"first at {int(wrong.nonzero()[0])}: {a[wrong][0]} and {b[wrong][0]}"


def bit_patterns(dtype: torch.dtype, n: int, seed: int) -> torch.Tensor:
    """Random bits: every exponent, denormals, infinities, NaN."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (n * dtype.itemsize,), generator=g, dtype=torch.uint8)
    return raw.view(dtype)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_of_torch_lerp(isa: str, dtype: torch.dtype, weight: float) -> None:
    n = 20_001  # not a multiple of a block (1024) or a vector
    g = torch.Generator().manual_seed(0)
    base = torch.randn(n, generator=g, dtype=torch.float64).to(dtype)
    near = (base.double() * (1 + 1e-2 * torch.randn(n, generator=g, dtype=torch.float64))).to(dtype)
    for tuned in (near, bit_patterns(dtype, n, 1)):
        assert_same_bits(native(base, tuned, weight), reference.lerp(base, tuned, weight))
    wild, wilder = bit_patterns(dtype, n, 2), bit_patterns(dtype, n, 3)
    assert_same_bits(native(wild, wilder, weight), reference.lerp(wild, wilder, weight))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_reference_is_torch_lerp(dtype: torch.dtype) -> None:
    """Away from equal values the reference is torch's own operator in that dtype, and ours with
    it."""
    base, tuned = (
        torch.randn(10_000, dtype=torch.float64).to(dtype),
        torch.randn(10_000, dtype=torch.float64).to(dtype),
    )
    for weight in WEIGHTS:
        assert_same_bits(
            native(base, tuned, weight),
            torch.where(base == tuned, base, torch.lerp(base, tuned, weight)),
        )


@pytest.mark.parametrize("base_type", FLOATS, ids=str)
def test_mixed_types(isa: str, base_type: torch.dtype) -> None:
    for tuned_type in FLOATS:
        base, tuned = torch.randn(3000).to(base_type), torch.randn(3000).to(tuned_type)
        assert_same_bits(native(base, tuned, 0.35), reference.lerp(base, tuned, 0.35))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ragged_tails_write_nothing_beyond(isa: str, dtype: torch.dtype) -> None:
    for n in [*range(35), 1023, 1024, 1025]:
        base, tuned = torch.randn(n + 64).to(dtype), torch.randn(n + 64).to(dtype)
        out = base.clone()
        _core.lerp(out.data_ptr(), FLOATS[dtype], tuned.data_ptr(), FLOATS[dtype], n, 0.35)
        assert_same_bits(out[:n], reference.lerp(base[:n], tuned[:n], 0.35))
        assert_same_bits(out[n:], base[n:])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_0_and_1_give_an_input_back(isa: str, dtype: torch.dtype) -> None:
    """Bit for bit, whatever the other holds: torch.lerp makes NaN of NaN and infinity there."""
    base, tuned = bit_patterns(dtype, 5_000, 5), bit_patterns(dtype, 5_000, 6)
    base[:3], tuned[:3] = torch.zeros(3).to(dtype), (-torch.zeros(3)).to(dtype)
    for weight, wanted in ((0.0, base), (1.0, tuned)):
        assert_same_bits(native(base, tuned, weight), wanted)
        assert_same_bits(reference.lerp(base, tuned, weight), wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_equal_stays_bit_equal(isa: str, dtype: torch.dtype, weight: float) -> None:
    """Infinities and -0 too, which torch.lerp would change; a frozen layer keeps its checksum."""
    base = bit_patterns(dtype, 5_000, 4)
    assert_same_bits(native(base, base.clone(), weight), base)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_conversion_is_torchs(dtype: torch.dtype) -> None:
    """Every float16 value and its neighbours in float32 round to fp8 as torch rounds them, overflow
    and denormals included: weight 1 of float32."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    values = torch.cat(
        [
            halves,
            torch.nextafter(halves, torch.tensor(torch.inf)),
            torch.nextafter(halves, torch.tensor(-torch.inf)),
        ]
    )
    base = torch.zeros(len(values), dtype=dtype)
    assert_same_bits(native(base, values, 1.0), reference.lerp(base, values, 1.0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_misaligned_memory(isa: str, dtype: torch.dtype) -> None:
    """A header of odd length puts every element at an odd address."""
    base, tuned = (torch.randn(5000).to(dtype) for _ in range(2))
    moved = [torch.zeros(5000 * dtype.itemsize + 1, dtype=torch.uint8) for _ in range(2)]
    for memory, values in zip(moved, (base, tuned), strict=True):
        memory[1:] = values.view(torch.uint8)
    out, other = (memory.data_ptr() + 1 for memory in moved)
    _core.lerp(out, FLOATS[dtype], other, FLOATS[dtype], 5000, 0.35)
    assert torch.equal(moved[0][1:], reference.lerp(base, tuned, 0.35).view(torch.uint8))
