"""benchmarks/bench_gpu.py without a GPU: every part runs on CPU tensors, over small shapes and with
a clock that is made up, and leaves its rows in the file of the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")
pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")

from refine_fast.bench import machine, rows

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "bench_gpu.py"
SECONDS = 0.1
"""Of every sample."""


class OnCpu(TorchFunctionMode):
    """What asks for a GPU or for pinned memory gets CPU memory."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if function is torch.Tensor.cuda:
            return args[0]
        return function(*args, **kwargs)


class Event:
    """A CUDA event on the made-up clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return SECONDS * 1e3


@pytest.fixture
def bench_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[ModuleType]:
    if torch.cuda.is_available():
        pytest.skip("benchmarks/gpu.sh runs it on the GPU")
    request.getfixturevalue("interpreted_bf16")
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {
        "RESULTS": tmp_path, "WIDTHS": (16,), "TARGET": 48, "SMALL": 32, "HUGE": 64, "WAVE": 16,
        "TILES": [(16, 32, 16, 4, 2)], "CLUSTERS": 10, "BAND_PEER_ROWS": 8, "PEER_TILE": (4, 100),
        "BAND": {"B": 20, "N": 200, "D": 16, "k": 5}, "STEP": {"batch": 4, "tokens": 6},
        "FUSED": {"tensors": 3, "rows": 8, "columns": 32}, "SIDE": 16, "ROUNDS": 2,
        "ENCODERS": {name: dict.fromkeys(sizes, 2) | {"hidden_size": 16}
                     for name, sizes in module.ENCODERS.items()},
        "MINI_BATCH": dict.fromkeys(module.MINI_BATCH, 2),
    }  # fmt: skip
    for name, value in small.items():
        assert hasattr(module, name)
        monkeypatch.setattr(module, name, value)
    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_device_name=lambda: "NVIDIA H100 80GB HBM3",
        get_device_properties=lambda index: SimpleNamespace(total_memory=80 << 30),
        set_per_process_memory_fraction=lambda fraction: None,
        Event=Event,
        synchronize=lambda: None,
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 0,
        max_memory_allocated=lambda: 64 << 20,
    )
    changed = {
        "cuda": cuda,
        "Generator": lambda device="cpu": torch.Generator("cpu"),
        "autocast": lambda device, dtype: torch.autocast("cpu", dtype),
        "compile": lambda function, dynamic: function,  # else minutes of a compiler
    }
    for user in (module, machine):
        monkeypatch.setattr(user, "torch", SimpleNamespace(**vars(torch) | changed))
    rows.place.cache_clear()
    with OnCpu():
        yield module
    rows.place.cache_clear()


LOSS = {"refine_fast", "torch eager"}
EXPECTED = {
    "target": {("info_nce", "train"): LOSS | {"refine_fast, 240 MB"}},
    "loss": {("info_nce", "train"): LOSS | {"torch.compile"}},
    "huge": {("info_nce", "train"): LOSS},
    "parts": {
        ("info_nce", "parts"): {
            "weights 16x32x16, 4 warps, 2 stages", "dq", "dd", "torch.mm q d^T"
        }
    },
    "band": {("band_topk", "skip_then_band"): {"refine_fast", "torch.mm + topk"}},
    "fuse": {("fuse_into", "cached"): {"refine_fast", "pinned copy"}},
    "step": {
        ("train_step", name): {"step", "loss within it"} for name in ("MiniLM-L6", "BERT-base")
    },
}  # fmt: skip
"""The contenders of each part, by operation and mode."""


@pytest.mark.parametrize("part", EXPECTED)
def test_part(
    part: str, bench_gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_gpu.main([part])
    (path,) = tmp_path.glob("*.csv")
    assert path.name == "nvidia-h100-80gb-hbm3.csv"
    written = rows.load(path)
    found: dict[tuple[str, str], set[str]] = {}
    for row in written:
        found.setdefault((row.op, row.mode), set()).add(row.provider)
        assert row.device == "NVIDIA H100 80GB HBM3"
    peers = {"memeff"} if importlib.util.find_spec("memeff") else set()
    assert {key: names - peers for key, names in found.items()} == EXPECTED[part]
    assert {row.metric for row in written} >= {"seconds"}
    assert (part in ("target", "loss", "huge")) == ("memeff" in capsys.readouterr().out)


def test_every_part_is_tested(bench_gpu: ModuleType) -> None:
    assert set(EXPECTED) == set(bench_gpu.PARTS)


def test_bad_arguments_are_one_sentence(bench_gpu: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no part is called bands: target band"):
        bench_gpu.main(["bands"])
    bench_gpu.torch.cuda.is_available = lambda: False
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        bench_gpu.main(["band"])
