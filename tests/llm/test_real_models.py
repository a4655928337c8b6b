"""Against models that really generate: tiny, random, made on the spot. They write nonsense; what is tested is that it comes through."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refine_fast.pipeline.chunks import Chunk
from refine_fast.pipeline.llm import IN_PROCESS, LLMSettings, generate_queries, probe
from refine_fast.pipeline.llm.local import LocalBackend
from refine_fast.pipeline.llm.request import Request

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 60,000 random weights over a byte-level BPE."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["who built the harbour and when was the quay made longer"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def settings(model: Path, **changes: Any) -> LLMSettings:
    return LLMSettings(**{"url": IN_PROCESS, "models": (str(model),), "max_reply_tokens": 24, "temperature": 0.0, **changes})


def test_in_process(tiny_model: Path, chunks: list[Chunk], tmp_path: Path) -> None:
    store = tmp_path / "replies.jsonl"
    account = generate_queries(chunks[:20], settings(tiny_model), store)[1]
    assert (account.replied, account.failed, account.structured_output) == (20, 0, None)
    assert 20 <= account.tokens_out <= 20 * 24
    assert sum(account.parsed.values()) == 20
    assert generate_queries(chunks[:20], settings(tiny_model), store)[1].reused == 20


def test_a_batch_writes_what_single_prompts_write(tiny_model: Path) -> None:
    """Left padding, attention masks and the end of each row: prompts of unlike length, together and alone."""
    requests = [Request(str(n), str(tiny_model), "", "who built the quay? " * n, {}, 12 + n, 0.0) for n in (1, 7, 3, 20)]
    backend = LocalBackend()
    together = backend._generate(requests)
    alone = [backend._generate([request])[0] for request in requests]
    assert together == alone


def test_a_model_that_is_not_there(chunks: list[Chunk], tmp_path: Path) -> None:
    from refine_fast.errors import RefineFastError

    with pytest.raises(RefineFastError, match="cannot be loaded"):
        generate_queries(chunks[:3], settings(tmp_path), tmp_path / "replies.jsonl")


@pytest.fixture
def serve(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "serve.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tiny_model), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output, subprocess.Popen([*command, "--device", "cpu"], stdout=output, stderr=output) as process:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()
        process.wait(20)


def test_transformers_serve(serve: str, tiny_model: Path, chunks: list[Chunk], tmp_path: Path) -> None:
    """It takes response_format and ignores it: replies are nonsense that must be counted, not stored as queries."""
    here = settings(tiny_model, url=serve, concurrency=4, timeout=60.0)
    (report,) = probe(here)
    assert report.reachable
    assert report.structured["plain"] == "answers"
    assert "honoured" not in report.structured.values()
    assert report.tokens_per_second
    account = generate_queries(chunks[:6], here, tmp_path / "replies.jsonl")[1]
    assert (account.replied, account.failed, account.calls) == (6, 0, 6)
    assert account.tokens_in > 6 * 100
    assert sum(account.parsed.values()) == 6
    assert account.kept + sum(account.dropped.values()) > 0
