"""What may differ between two models around their tensors, made by changing one of two copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = ["the pump of the mill drives the wheel", "an oil pump needs oil", "wheels turn mills"]
Change = Callable[[Path], object]


def tokens(algorithm: str) -> Tokenizer:
    """A small tokenizer trained on TEXTS."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    kinds: dict[str, tuple[Any, Any]] = {
        "WordPiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer),
        "BPE": (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer),
        "Unigram": (models.Unigram(), trainers.UnigramTrainer),
    }
    model, trainer = kinds[algorithm]
    unknown = {"unk_token": "[UNK]"} if algorithm == "Unigram" else {}
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        TEXTS, trainer(vocab_size=80, special_tokens=special, show_progress=False, **unknown)
    )
    return tokenizer


def roles(folder: Path, **settings: object) -> None:
    """The tokenizer_config.json of a BERT."""
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    content = {f"{role}_token": token for role, token in names.items()} | settings
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | content)
    )


def edit(file: str, *drop: str, **values: object) -> Change:
    """Sets fields of a JSON file ("a__b" is b inside a), or drops them."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for name in drop:
            content.pop(name, None)
        for name, value in values.items():
            *outer, last = name.split("__")
            inner = content
            for part in outer:
                inner = inner.setdefault(part, {})
            inner[last] = value
        (folder / file).write_text(json.dumps(content))

    return change


def swap_ids(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def change_model(change: Callable[[dict[str, Any]], object]) -> Change:
    """Changes the "model" part of tokenizer.json."""

    def edited(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content["model"])
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return edited


def swap_merges(model: dict[str, Any]) -> None:
    model["merges"][0], model["merges"][1] = model["merges"][1], model["merges"][0]


def add_token(special: bool) -> Change:
    def change(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(["[Q]"])
        tokenizer.save(str(folder / "tokenizer.json"))

    return change


def change_modules(change: Callable[[list[dict[str, Any]]], object]) -> Change:
    def edited(folder: Path) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        change(modules)
        (folder / "modules.json").write_text(json.dumps(modules))

    return edited


def without_normalize(folder: Path) -> None:
    """And Dense in the folder that it would then be saved in."""
    change_modules(lambda modules: modules.pop(2))(folder)
    shutil.rmtree(folder / "2_Normalize", ignore_errors=True)
    (folder / "3_Dense").rename(folder / "2_Dense")
    change_modules(lambda modules: modules[2].update(path="2_Dense"))(folder)


def fields(file: str, name: str, base: object, tuned: object) -> str:
    return f"{file}: {name} is {base!r} in base and {tuned!r} in tuned"


REFUSED: dict[str, tuple[str, Change, str]] = {
    "the order of the vocabulary": (
        "bert",
        swap_ids,
        r"tokenizer.json: the id of '\S+' is \d+ in base and \d+ in tuned, and so on for 2",
    ),
    "the order of the merges": (
        "bpe",
        change_model(swap_merges),
        r"tokenizer.json: merge 0 is \['\w+', '\w+'\] in base and \['\w+', '\w+'\] in tuned",
    ),
    "a piece's score": (
        "unigram",
        change_model(lambda model: model["vocab"][20].__setitem__(1, -1.5)),
        r"tokenizer.json: the score of '\S+' is -[\d.]+ in base and -1.5 in tuned",
    ),
    "another algorithm": (
        "bert",
        lambda folder: tokens("BPE").save(str(folder / "tokenizer.json")),
        fields("tokenizer.json", "model.type", "WordPiece", "BPE"),
    ),
    "a token more": (
        "bert",
        add_token(special=False),
        r"tokenizer.json: only tuned has the token '\[Q\]' with id \d+",
    ),
    "upper case": (
        "bert",
        edit("tokenizer_config.json", do_lower_case=False),
        fields("tokenizer_config.json", "do_lower_case", True, False),
    ),
    "activation": (
        "bert",
        edit("config.json", hidden_act="relu"),
        fields("config.json", "hidden_act", "gelu", "relu"),
    ),
    "codes": (
        "bert",
        edit("config.json", quantization_config={"quant_method": "fp8"}),
        r"config.json: \w+ has a quantization_config, whose weights are codes; dequantize",
    ),
    "heads": (
        "bert",
        edit("config.json", num_attention_heads=2),
        fields("config.json", "num_attention_heads", 4, 2),
    ),
    "epsilon": (
        "bert",
        edit("config.json", layer_norm_eps=0.1),
        fields("config.json", "layer_norm_eps", 1e-12, 0.1),
    ),
    "relative positions": (
        "bert",
        edit("config.json", position_embedding_type="relative_key"),
        fields("config.json", "position_embedding_type", "absolute", "relative_key"),
    ),
    "causal attention": (
        "bert",
        edit("config.json", is_decoder=True),
        fields("config.json", "is_decoder", False, True),
    ),
    "another architecture": (
        "bert",
        edit("config.json", model_type="roberta"),
        fields("config.json", "model_type", "bert", "roberta"),
    ),
    "heads of keys and values": (
        "qwen3",
        edit("config.json", num_key_value_heads=1),
        fields("config.json", "num_key_value_heads", 2, 1),
    ),
    "base of the rotary positions": (
        "qwen3",
        edit("config.json", rope_parameters__rope_theta=1e6),
        fields("config.json", "rope_theta", 10000.0, 1e6),
    ),
    "scaled rotary positions": (
        "qwen3",
        edit("config.json", rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        fields("config.json", "rope_scaling.rope_type", "default", "yarn"),
    ),
    "scaled rotary positions of transformers 4": (
        "qwen3",
        edit("config.json", "rope_parameters", rope_scaling={"type": "linear", "factor": 4.0}),
        fields("config.json", "rope_scaling.rope_type", "default", "linear"),
    ),
    "pooling": (
        "sbert",
        edit("1_Pooling/config.json", pooling_mode="cls"),
        fields("1_Pooling/config.json", "pooling_mode", "mean", "cls"),
    ),
    "pooling of sentence-transformers 5": (
        "sbert",
        edit("1_Pooling/config.json", "pooling_mode", pooling_mode_lasttoken=True),
        fields("1_Pooling/config.json", "pooling_mode", "mean", "lasttoken"),
    ),
    "pooling without the prompt": (
        "sbert",
        edit("1_Pooling/config.json", include_prompt=False),
        fields("1_Pooling/config.json", "include_prompt", True, False),
    ),
    "activation of Dense": (
        "sbert",
        edit("3_Dense/config.json", activation_function="torch.nn.modules.linear.Identity"),
        fields("3_Dense/config.json", "activation_function", "Tanh", "Identity"),
    ),
    "lower case before the tokenizer": (
        "sbert",
        edit("sentence_bert_config.json", do_lower_case=True),
        fields("sentence_bert_config.json", "do_lower_case", False, True),
    ),
    "no pooling": (
        "sbert",
        change_modules(lambda modules: modules.pop(1)),
        r"modules.json: the modules are Transformer, Pooling, Normalize, Dense in base and"
        " Transformer, Normalize, Dense in tuned",
    ),
}  # fmt: skip


HARMLESS: dict[str, tuple[str, Change, list[str]]] = {
    "nothing": ("sbert", lambda _: None, []),
    "where it comes from": (
        "bert",
        edit("config.json", transformers_version="4.1", _name_or_path="x", _commit="1"),
        [],
    ),
    "dtype": (
        "bert",
        edit("config.json", "dtype", torch_dtype="bfloat16"),
        [fields("config.json", "dtype", "float32", "bfloat16")],
    ),
    "training": (
        "bert",
        edit("config.json", hidden_dropout_prob=0.5, initializer_range=1.0, use_cache=False),
        ["hidden_dropout_prob", "initializer_range", "use_cache"],
    ),
    "a trainer's notes": (
        "bert",
        lambda folder: [
            edit("config.json", seed=0, batch_size=8, max_grad_norm=1.0)(folder.parent / "base"),
            edit("config.json", seed=1, batch_size=16, max_grad_norm=2.0)(folder),
        ],
        [fields("config.json", "seed", 0, 1), "batch_size", "max_grad_norm"],
    ),
    "another head": (
        "bert",
        edit("config.json", architectures=["BertForMaskedLM"], id2label={"0": "x", "1": "y"}),
        [fields("config.json", "architectures", ["BertModel"], ["BertForMaskedLM"])],
    ),
    "null for a default": ("bert", edit("config.json", hidden_act=None), ["only base has hidden_"]),
    "epsilon in float32": ("bert", edit("config.json", layer_norm_eps=9.9999999e-13), []),
    "rotary positions as transformers 4 writes them": (
        "qwen3",
        edit("config.json", "rope_parameters", rope_theta=10000, rope_scaling=None),
        [],
    ),
    "prompts": (
        "sbert",
        edit("config_sentence_transformers.json", prompts={"query": "q: ", "document": "d: "}),
        [
            fields("config_sentence_transformers.json", "prompts.query", "query: ", "q: "),
            "config_sentence_transformers.json: only tuned has prompts.document = 'd: '",
        ],
    ),
    "similarity": (
        "sbert",
        edit("config_sentence_transformers.json", similarity_fn_name="dot"),
        ["similarity_fn_name is 'cosine' in base and 'dot' in tuned"],
    ),
    "length of a text": (
        "sbert",
        lambda folder: [
            edit("sentence_bert_config.json", max_seq_length=8)(folder),
            edit("tokenizer_config.json", model_max_length=8)(folder),
        ],
        [],
    ),
    "no Normalize": (
        "sbert",
        without_normalize,
        ["modules.json: the modules are Transformer, Pooling, Normalize, Dense in base and"],
    ),
    "modules and pooling as older versions write them": (
        "sbert",
        lambda folder: [
            change_modules(
                lambda modules: [
                    m.update(type="sentence_transformers.models." + m["type"].split(".")[-1])
                    for m in modules
                ]
            )(folder),
            edit(
                "1_Pooling/config.json",
                "pooling_mode",
                "include_prompt",
                "embedding_dimension",
                word_embedding_dimension=32,
                pooling_mode_mean_tokens=True,
                pooling_mode_cls_token=False,
            )(folder),
        ],
        [],
    ),
    "a class of the model's own": (
        "sbert",
        change_modules(lambda modules: modules[0].update(type="custom_st.OwnTransformer")),
        [],
    ),
    "a special token more": (
        "bert",
        add_token(special=True),
        ["tokenizer.json: only tuned has the special token '[Q]' with id "],
    ),
    "merges as older versions write them": (
        "bpe",
        change_model(lambda model: model.update(merges=[" ".join(m) for m in model["merges"]])),
        [],
    ),
    "scores in float32": (
        "unigram",
        change_model(
            lambda model: [
                pair.__setitem__(1, torch.tensor(pair[1]).item()) for pair in model["vocab"]
            ]
        ),
        [],
    ),
    "truncation": (
        "bert",
        edit("tokenizer.json", truncation={"max_length": 8}, padding=None),
        [],
    ),
    "how a tokenizer is built": (
        "bert",
        edit("tokenizer.json", normalizer={"type": "NFC"}),
        ["tokenizer.json: normalizer is None in base and {'type': 'NFC'} in tuned"],
    ),
    "the token at the end": (
        "bert",
        lambda folder: roles(folder, do_lower_case=True, eos_token="[SEP]", pad_token="[MASK]"),
        [fields("tokenizer_config.json", "pad_token", "[PAD]", "[MASK]")],
    ),
    "no tokenizer": (
        "bert",
        lambda folder: [(folder / x).unlink() for x in ("tokenizer.json", "tokenizer_config.json")],
        [],
    ),
    "an adapter's leftovers": (
        "bert",
        edit("config.json", pad_token_id=3, eos_token_id=[1, 2]),
        ["pad_token_id is 0 in base and 3 in tuned"],
    ),
}  # fmt: skip
