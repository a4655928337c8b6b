"""Tiny random models that tests of fuse share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
)

WEIGHT = 0.35

SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(**SMALL, **SPECIAL, cls_token_id=1, sep_token_id=2)
    ),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**SMALL, **SPECIAL, num_key_value_heads=2, head_dim=8)),
}


def build(kind: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return MODELS[kind]().eval()
