"""The fault server as a fixture, and chunks to ask it about.

The client waits 120 seconds for a reply, so that a busy machine repeats no call; tests of time-outs
set their own limit and count nothing that a repeated call changes.
"""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import LLMSettings

MIX = {"question": 0.5, "keywords": 0.2, "claim": 0.15, "how-to": 0.15}


class Endpoint:
    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.url = f"{self.root}/v1"

    def set(self, **options: Any) -> None:
        self._call("/options", options)

    def stats(self) -> dict[str, Any]:
        return self._call("/stats", None)

    def settings(self, **changes: Any) -> LLMSettings:
        return LLMSettings(
            **{"url": self.url, "models": ("tiny",), "mix": MIX, "per_chunk": 4, **changes}
        )

    def _call(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(
            urllib.request.Request(self.root + path, data), timeout=120
        ) as answer:
            return json.load(answer)


@contextmanager
def _server() -> Iterator[Endpoint]:
    command = [sys.executable, str(Path(__file__).parent / "server.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdin
        yield Endpoint(int(process.stdout.readline()))
        process.stdin.close()
        process.wait(120)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[Endpoint]]:
    """Starts a server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    return _server


@pytest.fixture
def endpoint(serve: Callable[[], AbstractContextManager[Endpoint]]) -> Iterator[Endpoint]:
    with serve() as started:
        yield started


def make_chunks(count: int) -> list[Chunk]:
    text = (
        "Harbour {i} was built by the city of Port {i}. "
        "Its crane lifts {i} tonnes and its quay is {i}0 metres long."
    )
    texts = [text.format(i=i) for i in range(count)]
    return [
        Chunk(f"c{i}", text, "", f"file{i // 10}", 0, len(text)) for i, text in enumerate(texts)
    ]


@pytest.fixture
def chunks() -> list[Chunk]:
    return make_chunks(120)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly a wait between the tries of a request; how long they are is test_policy's."""
    monkeypatch.setattr("refine_fast.pipeline.queries.llm.dispatch.delay", lambda *_: 0.01)


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


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
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(
        ["who built the harbour and when was the quay made longer"], trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
