"""Tiny random encoders in the layouts that people bring, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

Make = Callable[[Path, Path], None]
"""Writes an encoder to the first folder; the second holds MiniLM, for its tokenizer."""

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}


def _word_tokenizer(minilm: Path, folder: Path) -> int:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def plain(config: str, model: str, **sizes: object) -> Make:
    """A folder of transformers alone."""

    def make(folder: Path, minilm: Path) -> None:
        words = _word_tokenizer(minilm, folder)
        made = getattr(tf, config)(vocab_size=words, pad_token_id=0, **sizes)
        network = getattr(tf, model)(made)
        network.to(made.dtype or torch.float32).save_pretrained(folder)

    return make


def layered(
    base: Make, *modules: str, dtype: torch.dtype | None = None, **settings: object
) -> Make:
    """sentence-transformers' layout over a folder of transformers: "mean", "cls" or "lasttoken",
    then "dense" and "normalize"."""

    def make(folder: Path, minilm: Path) -> None:
        inner = folder.with_name(folder.name + "-plain")
        base(inner, minilm)
        words = Transformer(str(inner), max_seq_length=96)
        width = words.get_embedding_dimension()
        parts = {
            "dense": lambda: Dense(width, 24, activation_function=torch.nn.Identity()),
            "normalize": Normalize,
        }
        chosen = [parts[name]() if name in parts else Pooling(width, name) for name in modules]
        encoder = SentenceTransformer(modules=[words, *chosen], device="cpu", **settings)
        encoder.to(dtype).save_pretrained(str(folder))

    return make


def router(folder: Path, minilm: Path) -> None:
    """Two transformers, one for queries and one for documents, without a common weight."""
    sides = []
    for side in ("query", "document"):
        inner = folder.with_name(f"{folder.name}-{side}")
        BERT(inner, minilm)
        sides.append([Transformer(str(inner), max_seq_length=96), Pooling(32, "mean")])
    routed = Router.for_query_document(query_modules=sides[0], document_modules=sides[1])
    SentenceTransformer(modules=[routed, Normalize()], device="cpu").save_pretrained(str(folder))


def half_static_router(folder: Path, minilm: Path) -> None:
    """Static embeddings for queries, a transformer for documents."""
    inner = folder.with_name(folder.name + "-plain")
    BERT(inner, minilm)
    routed = Router.for_query_document(
        query_modules=[StaticEmbedding(_tokens(minilm), embedding_dim=32)],
        document_modules=[Transformer(str(inner), max_seq_length=96), Pooling(32, "mean")],
    )
    SentenceTransformer(modules=[routed], device="cpu").save_pretrained(str(folder))


def _tokens(minilm: Path) -> Tokenizer:
    return Tokenizer.from_file(str(minilm / "tokenizer.json"))


def static(folder: Path, minilm: Path) -> None:
    """One vector a token, as model2vec distils them."""
    module = StaticEmbedding(_tokens(minilm), embedding_dim=32)
    SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(folder))


def model2vec(folder: Path, minilm: Path) -> None:
    """The same under model2vec's own names, in half precision."""
    from safetensors.torch import load_file, save_file

    static(folder, minilm)
    weights = load_file(folder / "model.safetensors")
    table = weights["embedding.weight"].half()
    save_file({"embeddings": table}, folder / "model.safetensors", {"format": "pt"})


def without_padding_token(folder: Path, minilm: Path) -> None:
    """GPT-2, whose tokenizer ends texts and never pads them."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["the pump of the mill"], trainer)
    sizes = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    words = tokenizer.get_vocab_size()
    tf.GPT2Model(tf.GPT2Config(vocab_size=words, **sizes, **ends)).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)


def pickled(base: Make) -> Make:
    """With pytorch_model.bin in place of every safetensors file."""

    def make(folder: Path, minilm: Path) -> None:
        from safetensors.torch import load_file

        base(folder, minilm)
        for file in folder.rglob("model.safetensors"):
            torch.save(load_file(file), file.with_name("pytorch_model.bin"))
            file.unlink()

    return make


def adapter(folder: Path, minilm: Path) -> None:
    """A LoRA adapter beside its base."""
    from peft import LoraConfig, get_peft_model

    base = folder.with_name(folder.name + "-base")
    BERT(base, minilm)
    config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(tf.AutoModel.from_pretrained(base), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def own_code(folder: Path, minilm: Path) -> None:
    """BERT under a name of its own, with the code in the folder."""
    BERT(folder, minilm)
    (folder / "modeling_own.py").write_text(
        "from transformers import BertConfig, BertModel\n"
        "class OwnConfig(BertConfig):\n    model_type = 'own'\n"
        "class OwnModel(BertModel):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    own = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config | own))


def own_module(folder: Path, minilm: Path) -> None:
    """BERT below a module whose code is in the folder."""
    layered(BERT, "mean")(folder, minilm)
    (folder / "own_scale.py").write_text(
        "from sentence_transformers.base.modules import Module\n"
        "class Scale(Module):\n"
        "    config_keys = []\n"
        "    def forward(self, features, **_):\n"
        "        features['sentence_embedding'] = 2 * features['sentence_embedding']\n"
        "        return features\n"
        "    def save(self, path, *_, **__):\n        self.save_config(path)\n"
        "    @classmethod\n    def load(cls, *_, **__):\n        return cls()\n"
    )
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Scale", "type": "own_scale.Scale"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Scale").mkdir()
    (folder / "2_Scale" / "config.json").write_text("{}")


BERT = plain("BertConfig", "BertModel", **SMALL)
T5 = plain(
    "T5Config", "T5EncoderModel", d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2
)  # fmt: skip
QWEN3 = plain("Qwen3Config", "Qwen3Model", **GROUPED)
GEMMA = plain("Gemma3TextConfig", "Gemma3TextModel", **GROUPED, use_bidirectional_attention=True)
MODERNBERT = plain("ModernBertConfig", "ModernBertModel", **SMALL)
INSTRUCTION = "Instruct: find the passage that answers\nQuery: "

ENCODERS: dict[str, Make] = {
    "BERT": BERT,
    "XLM-R, bf16": layered(
        plain("XLMRobertaConfig", "XLMRobertaModel", **SMALL), "mean", dtype=torch.bfloat16
    ),
    "MPNet, fp16": layered(
        plain("MPNetConfig", "MPNetModel", **SMALL), "mean", "normalize", dtype=torch.float16
    ),
    "DistilBERT": plain(
        "DistilBertConfig", "DistilBertModel", dim=32, hidden_dim=64, n_layers=2, n_heads=2
    ),
    "T5": layered(T5, "mean", "dense", "normalize"),
    "E5": layered(BERT, "mean", "normalize", prompts={"query": "query: ", "passage": "passage: "}),
    "BGE": layered(BERT, "cls", "normalize", prompts={"query": "Represent this sentence: "}),
    "Nomic": layered(
        BERT,
        "mean",
        prompts={"query": "search_query: ", "document": "search_document: "},
        truncate_dim=16,
    ),
    "NomicBERT": layered(
        plain("NomicBertConfig", "NomicBertModel", **SMALL), "mean", dtype=torch.bfloat16
    ),
    "ModernBERT": layered(MODERNBERT, "cls", "normalize"),
    "Qwen3-Embedding": layered(
        QWEN3, "lasttoken", "normalize", dtype=torch.bfloat16, prompts={"query": INSTRUCTION}
    ),
    "EmbeddingGemma": layered(
        GEMMA,
        "mean",
        "dense",
        "normalize",
        prompts={"query": "task: search result | query: ", "document": "title: none | text: "},
    ),
    "dot product": layered(BERT, "cls", similarity_fn_name="dot"),
    "Router": router,
    "half static Router": half_static_router,
    "static": static,
    "model2vec": model2vec,
    "no padding token": without_padding_token,
    "pickled": pickled(layered(BERT, "mean", "dense")),
    "adapter": adapter,
    "own code": own_code,
}
