"""Against models that really generate: tiny, random, made on the spot.

They write nonsense; what is tested is that it comes through.
"""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import (
    IN_PROCESS,
    LLMSettings,
    generate_queries,
    probe,
    transformers_backend,
)
from refine_fast.pipeline.queries.llm.request import Reply, Request
from refine_fast.pipeline.queries.llm.transformers_backend import LocalBackend


def settings(model: Path, **changes: Any) -> LLMSettings:
    return LLMSettings(
        **{
            "url": IN_PROCESS,
            "models": (str(model),),
            "max_reply_tokens": 24,
            "temperature": 0.0,
            "mix": {"question": 1.0},
            "per_chunk": 4,
            **changes,
        }
    )


def test_in_process(tiny_model: Path, chunks: list[Chunk], tmp_path: Path) -> None:
    store = tmp_path / "replies.jsonl"
    account = generate_queries(chunks[:20], settings(tiny_model), store)[1]
    assert (account.replied, account.failed, account.structured_output) == (20, 0, None)
    assert 20 <= account.tokens_out <= 20 * 24
    assert sum(account.parsed.values()) == 20
    assert generate_queries(chunks[:20], settings(tiny_model), store)[1].reused == 20


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_batch_writes_what_single_prompts_write(
    tiny_model: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of unlike length share a buffer, each with its own mask and generator; where one ends,
    another takes its place. In float32: where bf16 is fast (AMX), a product of one row rounds
    otherwise than one of four, and a drawn token may differ."""
    monkeypatch.setattr(transformers_backend, "has_fast_bf16", lambda _: False)
    requests = [
        Request(str(n), str(tiny_model), "", "who built the quay? " * n, {}, 12 + n, temperature)
        for n in (1, 7, 3, 20)
    ]
    together = asyncio.run(written(requests))
    assert together == [asyncio.run(written([request]))[0] for request in requests]


async def written(requests: list[Request]) -> list[Reply]:
    backend = LocalBackend()
    try:
        return await asyncio.gather(*map(backend.complete, requests))
    finally:
        await backend.close()


def test_a_model_that_is_not_there(chunks: list[Chunk], tmp_path: Path) -> None:
    from refine_fast.errors import RefineFastError

    with pytest.raises(RefineFastError, match="cannot be loaded"):
        generate_queries(chunks[:3], settings(tmp_path), tmp_path / "replies.jsonl")


@contextlib.contextmanager
def served(log: Path, *command: str) -> Iterator[str]:
    """The URL of an endpoint that the Python module and arguments ``command`` open on a free port
    of loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, "-m", *command, *where], stdout=output, stderr=output
        ) as process,
    ):
        try:
            _wait_until_it_answers(process, f"http://127.0.0.1:{port}/v1/models", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(120)


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """However long that takes on a busy machine; pytest's own limit ends a server that hangs."""
    while True:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=60)
            return
        except urllib.error.HTTPError:  # transformers answers 500 if no cache of models exists
            return
        except OSError:
            time.sleep(0.1)


@pytest.fixture
def transformers_serve(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    pytest.importorskip(
        "fastapi", reason="transformers serve needs fastapi and uvicorn: pip install '.[test]'"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["transformers.cli.transformers", "serve", str(tiny_model), "--device", "cpu"]
    with served(tmp_path / "serve.log", *command) as url:
        yield url


def test_transformers_serve(
    transformers_serve: str, tiny_model: Path, chunks: list[Chunk], tmp_path: Path
) -> None:
    """It takes response_format and ignores it: replies are nonsense that must be counted, not
    stored as queries."""
    here = settings(tiny_model, url=transformers_serve, concurrency=4, timeout=600.0)
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


@pytest.fixture
def llama_cpp(tiny_model: Path, tmp_path: Path) -> Iterator[str]:
    """llama-cpp-python's server on a random GGUF of the same shape and tokenizer."""
    pytest.importorskip(
        "llama_cpp.server.app",
        reason="opt-in: pip install 'llama-cpp-python[server]' (compiles for minutes)",
    )
    gguf = pytest.importorskip(
        "gguf", reason="opt-in: pip install gguf, which writes the model's file"
    )
    from transformers import AutoModelForCausalLM

    tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(model.config.hidden_size)
    writer.add_block_count(model.config.num_hidden_layers)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(model.config.num_attention_heads)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL if token in ("<s>", "</s>") else gguf.TokenType.NORMAL
            for token in tokens
        ]
    )
    writer.add_token_merges(
        [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in tokenizer["model"]["merges"]
        ]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template((tiny_model / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with served(
        tmp_path / "serve.log",
        "llama_cpp.server",
        "--model",
        str(tmp_path / "tiny.gguf"),
        "--n_ctx",
        "4096",
    ) as url:
        yield url


def test_llama_cpp_server(
    llama_cpp: str, tiny_model: Path, chunks: list[Chunk], tmp_path: Path
) -> None:
    """It answers 500 to json_schema and enforces json_object with a schema: even a random model
    then writes what the schema says."""
    here = settings(tiny_model, url=llama_cpp, concurrency=4, timeout=600.0, max_reply_tokens=200)
    (report,) = probe(here)
    assert report.structured == {
        "json_schema": "rejected",
        "json_object": "honoured",
        "plain": "answers",
    }
    account = generate_queries(chunks[:6], here, tmp_path / "replies.jsonl")[1]
    assert (account.structured_output, account.replied, account.failed) == ("json_object", 6, 0)
    assert account.parsed == {"schema": 6}
