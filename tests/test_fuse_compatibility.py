"""What surrounds the tensors of two models: fuse refuses, or reports, what differs there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import ENCODERS
from fuse_changes import (
    HARMLESS,
    REFUSED,
    Change,
    change_modules,
    edit,
    fields,
    roles,
    swap_ids,
    tokens,
)
from fuse_models import SMALL, SPECIAL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    Transformer,
)
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model

import refine_fast as rf
from refine_fast.cli import main
from refine_fast.errors import RefineFastError
from refine_fast.fuse.compatibility import compare_models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders bert, bpe, unigram, qwen3 (plain) and sbert (sentence-transformers)."""
    root = tmp_path_factory.mktemp("made")
    for name, algorithm in (("bert", "WordPiece"), ("bpe", "BPE"), ("unigram", "Unigram")):
        torch.manual_seed(0)
        BertModel(BertConfig(**SMALL)).save_pretrained(root / name)
        tokens(algorithm).save(str(root / name / "tokenizer.json"))
        roles(root / name, do_lower_case=True)
    Qwen3Model(Qwen3Config(**SMALL, **SPECIAL, num_key_value_heads=2, head_dim=8)).save_pretrained(
        root / "qwen3"
    )
    words = Transformer(str(root / "bert"), max_seq_length=64)
    parts = [words, Pooling(32, "mean"), Normalize(), Dense(32, 16)]
    prompts = {"query": "query: ", "document": ""}
    SentenceTransformer(modules=parts, device="cpu", prompts=prompts).save_pretrained(
        str(root / "sbert")
    )
    return root


@pytest.fixture
def pair(made: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Copies a model twice, as base and as tuned, whose tensors are moved."""

    def copies(kind: str, change: Change = lambda _: None, side: str = "tuned") -> tuple[Path, ...]:
        folders = tuple(shutil.copytree(made / kind, tmp_path / x) for x in ("base", "tuned"))
        for file in folders[1].rglob("*.safetensors"):
            moved = {name: t + 1 for name, t in load_file(file).items()}
            save_file(moved, file, {"format": "pt"})
        change(tmp_path / side)
        return folders

    return copies  # type: ignore[return-value]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_unless_forced(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, case: str
) -> None:
    kind, change, message = REFUSED[case]
    base, tuned = pair(kind, change)
    expected = message if "\\" in message else re.escape(message)
    with pytest.raises(RefineFastError, match=expected) as error:
        rf.fuse(base, tuned, tmp_path / "out")
    assert "pass force=True (--force)" in str(error.value)
    assert str(base) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    report = rf.fuse_sweep(base, tuned, {0.5: tmp_path / "out"}, force=True)[0.5]
    assert any(re.search(expected, difference) for difference in report.differences)
    assert re.search(expected, str(report))
    for file in base.rglob("*.json"):  # the output is base's in everything but the tensors
        assert (tmp_path / "out" / file.relative_to(base)).read_bytes() == file.read_bytes()
    # the other way round, it is refused too
    with pytest.raises(RefineFastError, match="pass force=True"):
        rf.fuse(tuned, base, tmp_path / "again")


def test_fields_of_unknown_architectures(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """Refused by the words of their names, and only where both give them: a library that saves a
    model again adds fields and drops fields."""
    base, tuned = pair("bert")
    edit("config.json", text_config={"residual_scale": 0.5})(tuned)
    report = rf.fuse(base, tuned, tmp_path / "out")
    assert report.differences == ["config.json: only tuned has text_config.residual_scale = 0.5"]
    edit("config.json", text_config={"residual_scale": 2})(base)
    with pytest.raises(
        RefineFastError, match=r"text_config.residual_scale is 2 in base and 0.5 in tuned"
    ):
        rf.fuse(base, tuned, tmp_path / "out", overwrite=True)


def test_one_message_names_three_differences(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    names = [f"layer_{letter}" for letter in "abcde"]
    base, tuned = pair("bert", edit("config.json", **dict.fromkeys(names, 2)), "base")
    edit("config.json", **dict.fromkeys(names, 1))(tuned)
    with pytest.raises(
        RefineFastError, match=r"_a is 2 .*; config.json: layer_c is 2 .*; and 2 more differences:"
    ):
        rf.fuse(base, tuned, tmp_path / "out")


@pytest.mark.parametrize("case", HARMLESS)
def test_reported(pair: Callable[..., tuple[Path, Path]], tmp_path: Path, case: str) -> None:
    kind, change, messages = HARMLESS[case]
    base, tuned = pair(kind, change)
    report = rf.fuse(base, tuned, tmp_path / "out")
    assert len(report.differences) >= len(messages)
    assert messages or report.differences == []
    for message in messages:
        assert any(message in difference for difference in report.differences), report.differences
        assert message in str(report)
    fused = {
        str(file.relative_to(base)): load_file(tmp_path / "out" / file.relative_to(base))
        for file in base.rglob("*.safetensors")
    }
    for name, content in fused.items():  # every module found its partner
        for key, t in load_file(base / name).items():
            assert torch.allclose(content[key], t + 0.35, atol=1e-5), (name, key)
    rf.fuse(tuned, base, tmp_path / "again")  # nor is it refused the other way round


def test_files_alone_have_no_surroundings(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pair("bert", edit("config.json", hidden_act="relu"))
    files = [folder / "model.safetensors" for folder in (base, tuned)]
    assert rf.fuse(*files, tmp_path / "out.safetensors").differences == []


def test_dtypes_of_tensors_are_reported(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, tuned = pair("bert")
    half = {name: t.bfloat16() for name, t in load_file(tuned / "model.safetensors").items()}
    save_file(half, tuned / "model.safetensors", {"format": "pt"})
    report = rf.fuse(base, tuned, tmp_path / "out")
    said = f"the dtype of {len(half)} tensors is F32 in base and BF16 in tuned"
    assert report.differences == [said]


def slow(folder: Path) -> None:
    """The files that a tokenizer had before tokenizer.json."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("kind", ["bert", "bpe"])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_tokenizers_of_older_versions(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, kind: str, side: str
) -> None:
    base, tuned = pair(kind, slow, side)
    assert rf.fuse(base, tuned, tmp_path / "out").differences == []
    swap_ids(tuned if side == "base" else base)
    with pytest.raises(RefineFastError, match=r"(vocab|tokenizer).* the id of '\S+' is \d+ in"):
        rf.fuse(base, tuned, tmp_path / "again")


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_tokenizer_in_a_form_that_is_not_read(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, side: str
) -> None:
    """It is neither refused nor passed over in silence."""

    def sentencepiece(folder: Path) -> None:
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")

    report = rf.fuse(*pair("unigram", sentencepiece, side), tmp_path / "out")
    (difference,) = report.differences
    assert re.fullmatch(r"tokenizer.json in \w+ and tokenizer.model in \w+ were not compared",
                        difference)  # fmt: skip


def test_plain_transformers_and_sentence_transformers(made: Path, tmp_path: Path) -> None:
    (tmp_path / "older").mkdir()
    shutil.copytree(made / "bert", tmp_path / "older" / "0_Transformer")
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "models.Transformer"}]
    (tmp_path / "older" / "modules.json").write_text(json.dumps(modules))
    report = rf.fuse(tmp_path / "older", made / "bert", tmp_path / "out")
    assert report.differences == []
    report = rf.fuse(made / "bert", tmp_path / "older", tmp_path / "plain")
    assert report.differences == ["modules.json: only tuned has one"]
    edit("config.json", hidden_act="relu")(tmp_path / "older" / "0_Transformer")
    with pytest.raises(RefineFastError, match=r"0_Transformer/config.json: hidden_act is 'relu'"):
        rf.fuse(tmp_path / "older", made / "bert", tmp_path / "again")


def test_routes(made: Path, tmp_path: Path) -> None:
    """The modules of a router, each compared with its own."""
    sides = [[Transformer(str(made / "bert")), Pooling(32, "mean")] for _ in range(2)]
    routed = Router.for_query_document(query_modules=sides[0], document_modules=sides[1])
    SentenceTransformer(modules=[routed], device="cpu").save_pretrained(str(tmp_path / "base"))
    tuned = shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    assert rf.fuse(tmp_path / "base", tuned, tmp_path / "out").differences == []
    (pooling,) = tuned.rglob("document_1_Pooling/config.json")
    edit("config.json", pooling_mode="cls")(pooling.parent)
    with pytest.raises(RefineFastError, match=r"document_1_Pooling/config.json: pooling_mode is"):
        rf.fuse(tmp_path / "base", tuned, tmp_path / "again")


@pytest.mark.parametrize("name", ENCODERS)
def test_saving_a_model_again_changes_nothing(minilm: Path, tmp_path: Path, name: str) -> None:
    """What today's libraries write of a model that they have read is never refused."""
    ENCODERS[name](tmp_path / "base", minilm)
    if not any((tmp_path / "base").rglob("*.safetensors")) or "adapter" in name:
        pytest.skip("a run converts this kind before it fuses; tests/test_encoders.py covers it")
    model = SentenceTransformer(str(tmp_path / "base"), device="cpu", trust_remote_code=True)
    model.save_pretrained(str(tmp_path / "tuned"))
    assert compare_models(tmp_path / "base", tmp_path / "tuned").refused == []


def test_minilm_saved_again(minilm: Path, tmp_path: Path) -> None:
    """As published in 2021, and as sentence-transformers writes it today."""
    SentenceTransformer(str(minilm), device="cpu").save_pretrained(str(tmp_path / "tuned"))
    found = compare_models(minilm, tmp_path / "tuned")
    assert found.refused == []
    assert len(found.harmless) < 5  # short enough to be read


UNREADABLE = {
    "not JSON": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[]",
    "deep": b'{"a":' * 200_000,
    "deep enough for a recursion": b'{"a":' * 600 + b"1" + b"}" * 600,
    "lists": b'{"a":' + b"[" * 600 + b"]" * 600 + b"}",
    "empty": b"",
    "400 digits": b'{"layer_norm_eps": 1' + b"0" * 400 + b"}",
}
FOR_TOKENIZER = {
    "no tokenizer": b'{"added_tokens": [1], "model": {"vocab": [["a"], 1], "merges": 2}}',
    "no merge": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [null]}}',
    "no token": b'{"model": {"vocab": [[1, 0.5]]}}',
    "no id": b'{"added_tokens": [{"content": "a", "id": 1e999}]}',
}
FOR_SETTINGS = {
    "no mask": b'{"mask_token": ["a"]}',
    "no digit": '{"added_tokens_decoder": {"\u00b2": {"content": "a"}}}'.encode(),
}
FILES = {
    "config.json": UNREADABLE,
    "tokenizer.json": UNREADABLE | FOR_TOKENIZER,
    "tokenizer_config.json": UNREADABLE | FOR_SETTINGS,
}


@pytest.mark.parametrize(
    ("file", "content"), [(file, content) for file in FILES for content in FILES[file]]
)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_files_that_cannot_be_read_are_reported(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, side: str, file: str, content: str
) -> None:
    """The output has base's, as it is: that they were not compared is all there is to say."""

    def change(folder: Path) -> None:
        (folder / file).write_bytes(FILES[file][content])

    report = rf.fuse(*pair("bert", change, side), tmp_path / "out")
    (difference,) = report.differences
    assert "not compared: " in difference
    assert str(tmp_path / side / file) in difference
    assert "\n" not in difference


def values(*strings: str) -> st.SearchStrategy[Any]:
    """Anything that JSON holds."""
    leaves = (
        st.none() | st.booleans() | st.integers(-2, 2) | st.just(10**400) | st.floats()
        | st.sampled_from(strings)
    )  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(strings), inner, max_size=3)
        ),
        max_leaves=8,
    )


def objects(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), values("a", "b", "1", "\u00b2", *names))


CONFIGS = objects(
    "model_type", "hidden_act", "layer_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "type", "torch_dtype", "pooling_mode", "pooling_mode_cls_token", "activation_function",
)  # fmt: skip
TOKENIZERS = st.fixed_dictionaries(
    {},
    optional={
        "model": objects("type", "vocab", "merges"),
        "added_tokens": st.lists(objects("content", "id", "special"), max_size=2)
        | values("content", "id"),
        "normalizer": values("a"),
    },
)
SETTINGS = objects("mask_token", "content", "special", "added_tokens_decoder", "do_lower_case")


@settings(
    max_examples=int(os.environ.get("REFINE_FAST_FUZZ", "1000")) // 5,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(*[st.tuples(CONFIGS, TOKENIZERS, SETTINGS)] * 2)
def test_fuzzed_files(tmp_path: Path, base: tuple[Any, ...], tuned: tuple[Any, ...]) -> None:
    """Whatever they hold, what differs is named, each in one line."""
    for side, contents in (("base", base), ("tuned", tuned)):
        (tmp_path / side).mkdir(exist_ok=True)
        for file, content in zip(FILES, contents, strict=True):
            (tmp_path / side / file).write_text(json.dumps(content))
    found = compare_models(tmp_path / "base", tmp_path / "tuned")
    assert all("\n" not in difference for difference in found.refused + found.harmless)


@pytest.mark.parametrize("path", ["../base/1_Pooling", "/tmp"])
def test_modules_outside_the_model(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, path: str
) -> None:
    base, tuned = pair("sbert", change_modules(lambda modules: modules[1].update(path=path)))
    with pytest.raises(RefineFastError, match=r"modules.json is malformed: .* is outside"):
        rf.fuse(base, tuned, tmp_path / "out")


def test_on_the_command_line(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned = pair("bert", edit("config.json", hidden_act="relu"))
    command = ["fuse", str(base), str(tuned), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "hidden_act is 'gelu' in base and 'relu' in tuned" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert "differs: config.json: hidden_act is 'gelu'" in "".join(capsys.readouterr())
    assert main([*command, "--force", "--overwrite", "--json"]) == 0
    (difference,) = json.loads(capsys.readouterr().out)["differences"]
    assert difference == fields("config.json", "hidden_act", "gelu", "relu")
