"""Generation with continuous batching, against transformers' own."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork_script
from transformers import LlamaConfig, LlamaForCausalLM

from refine_fast.pipeline.queries.llm.continuous_batch import (
    FULL,
    MIN_SHARED,
    SLIDING,
    ContinuousBatch,
    Lines,
    Row,
    Sampling,
    unsupported_layers,
)

GREEDY, HOT = Sampling(), Sampling(2.0, 40, 0.95)
END = 1


@pytest.fixture(scope="module")
def model() -> Any:
    """Grouped queries: three heads share one of keys and values.

    In float64, so that rounding, which depends on a row's neighbours, decides no token.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=END, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def prompts(count: int, shared: int = 0) -> list[list[int]]:
    draw = random.Random(0)
    first = [draw.randrange(2, 120) for _ in range(shared)]
    return [
        first + [draw.randrange(2, 120) for _ in range(draw.randrange(3, 160))]
        for _ in range(count)
    ]


def write(model: Any, rows: list[Row], places: int) -> list[Row]:
    """At most ``places`` rows at a time."""
    batch, waiting, done = ContinuousBatch(model, {END}), list(rows), []
    while waiting or len(batch):
        while waiting and len(batch) < places:
            done += batch.admit(waiting.pop(0))
        if len(batch):
            done += batch.step()
    assert sorted(map(id, done)) == sorted(map(id, rows))
    return rows


def test_greedy_replies_are_those_of_transformers(model: Any) -> None:
    """Also where prompts share a beginning, which is read once."""
    for shared in (0, MIN_SHARED + 3):
        given = prompts(9, shared)
        rows = write(model, [Row(p, GREEDY, 0, 5 + i) for i, p in enumerate(given)], places=3)
        for i, (prompt, row) in enumerate(zip(given, rows, strict=True)):
            with torch.inference_mode():
                output = model.generate(
                    torch.tensor([prompt]), max_new_tokens=5 + i, do_sample=False
                )
            expected = output[0, len(prompt) :].tolist()
            assert row.finish == ("stop" if expected[-1] == END else "length")
            assert row.tokens == [token for token in expected if token != END]


SHAPE: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16,
    "bos_token_id": 0, "eos_token_id": END, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(
    "layers", [None, [SLIDING, FULL], [SLIDING, SLIDING], [FULL, FULL]], ids=str
)
def test_layers_that_slide_see_their_window_alone(layers: list[str] | None) -> None:
    """Prompts longer than it, replies that grow beyond it, and beginnings that are shared."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model: Any = (
        MistralForCausalLM(MistralConfig(**SHAPE))
        if layers is None
        else Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, layer_types=layers))
    )
    model.eval()
    given = [*prompts(5, MIN_SHARED + 3), [5, 6, 7]]
    for prompt, row in zip(
        given, write(model, [Row(p, GREEDY, 0, 24) for p in given], places=3), strict=True
    ):
        with torch.inference_mode():
            output = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        expected = output[0, len(prompt) :].tolist()
        assert row.tokens == [token for token in expected if token != END]


def test_a_layer_that_keeps_more_than_keys_and_values_is_named() -> None:
    from transformers import Lfm2Config, MambaConfig

    assert unsupported_layers(LlamaConfig()) is None
    mixed = Lfm2Config(num_hidden_layers=2, layer_types=[FULL, "conv"])
    assert unsupported_layers(mixed) == "conv"
    assert unsupported_layers(MambaConfig()) == "linear_attention"


def test_a_shared_beginning_is_read_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ContinuousBatch(model, {END})
    read = []
    forward = batch._forward
    monkeypatch.setattr(
        batch,
        "_forward",
        lambda tokens, *rest: read.append(tokens.shape[1]) or forward(tokens, *rest),
    )
    given = prompts(4, shared=100)
    for prompt in given:
        batch.admit(Row(prompt, GREEDY, 0, 1))
    own = [len(prompt) - 100 for prompt in given]
    assert read == [100 + own[0], 100, *own[1:]]


def test_a_row_draws_the_same_whatever_its_neighbours(model: Any) -> None:
    given = prompts(8, shared=40)

    def drawn(places: int, seeds: range) -> list[list[int]]:
        rows = [Row(p, HOT, seed, 12) for p, seed in zip(given, seeds, strict=True)]
        return [row.tokens for row in write(model, rows, places)]

    alone = drawn(1, range(8))
    assert drawn(8, range(8)) == drawn(3, range(8)) == alone
    assert drawn(8, range(8, 16)) != alone


def test_replies_have_the_form_of_lines(model: Any) -> None:
    """Each line begins with one of the starts, none twice, and ends at its mark; what does not get
    there is cut at the limit."""
    form = Lines(count=2, starts=(10, 11, 12), ends=frozenset(range(60, 120)), line_break=5)
    rows = write(model, [Row(p, HOT, i, 40, form) for i, p in enumerate(prompts(12))], places=4)
    assert {row.finish for row in rows} == {"stop"}
    for row in rows:
        lines = bytes(row.tokens).split(bytes([5]), 1)
        assert len(lines) == 2
        assert lines[0][-1] in form.ends
        assert row.tokens[-1] in form.ends
        assert {lines[0][0], lines[1][0]} <= set(form.starts)
        assert lines[0][0] != lines[1][0]


def test_lines_use_each_start_once_while_there_is_one() -> None:
    """Only the beginning of a line uses a start; a form of more lines than starts is filled too."""
    form = Lines(count=4, starts=(10, 11), ends=frozenset([60]), line_break=5)
    row = Row([1], HOT, 0, 40, form)
    allowed = []
    for line in ([10, 11, 60], [11, 60], [10, 60], [11, 60]):
        allowed.append(row.allowed)
        for token in line:
            row.add(token, set())
        if row.finish is None:
            assert row.allowed == [5]
            row.add(5, set())
    assert allowed == [[10, 11], [11], [10, 11], [10, 11]]
    assert row.finish == "stop"


SCRIPT = """
import sys
from pathlib import Path
from transformers import LlamaForCausalLM
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import LLMSettings, generate_queries
LlamaForCausalLM.to = lambda model, *_: model.double()  # as in the fixture above
model, store = sys.argv[1:]
texts = [f"Harbour {i} was built by the city of Port {i}." for i in range(40)]
chunks = [Chunk(f"c{i}", text, "", f"f{i}", 0, len(text)) for i, text in enumerate(texts)]
settings = LLMSettings(
    "transformers", (model,), {"question": 1.0}, 2, temperature=1.0, max_reply_tokens=40
)
generate_queries(chunks, settings, Path(store))
"""


def test_kill_9_repeats_nothing_and_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    import json

    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run = SCRIPT, str(tiny_model)
    process = fork_script(*run, str(killed))
    while not (killed.exists() and b"\n" in killed.read_bytes()):
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()  # others are being written
    process.join()
    before = killed.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 0 < before.count(b"\n") < 40
    for store in (killed, whole):
        process = fork_script(*run, str(store))
        process.join(300)
        assert process.exitcode == 0
    assert killed.read_bytes().startswith(before)

    def texts(store: Path) -> dict[str, str]:
        records = [json.loads(line) for line in store.read_text().splitlines()]
        assert len({record["key"] for record in records}) == len(records) == 40
        return {record["chunk"]: record["text"] for record in records}

    assert texts(killed) == texts(whole)
