"""``refine-fast prompt --try``: what a prompt yields on a few passages."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from rich.table import Table
from rich.text import Text

from ..artifacts import REPLIES
from ..config import RunConfig
from ..console import Console
from ..context import RunContext
from ..encoder.load import encoder_folder, load_encoder
from ..queries.llm import generate_queries
from ..stages.chunk import cut, read_documents


def try_prompt(config: RunConfig, count: int, console: Console) -> None:
    """Sends passages drawn by the seed through the prompt, and prints what would be kept.

    The round trip, which needs the whole collection, is left out; of duplicates, those among these
    passages are dropped.

    Args:
        config: the documents, the prompt and the language model; replies go to its folder.
        count: passages.
        console: where the passages and their queries go.

    Raises:
        RefineFastError: if the model cannot be asked.
    """
    settings = config.model_copy(update={"round_trip": 0}).llm_settings()
    assert settings is not None
    context = RunContext(config, encoder_folder(config.model), console)
    chunks = cut(context, load_encoder(context.encoder), read_documents(context, config.docs))
    drawn = np.random.default_rng(config.seed).permutation(len(chunks))[:count]
    passages = [chunks[i] for i in sorted(drawn)]
    queries, account = generate_queries(passages, settings, context.path(REPLIES))
    kept = defaultdict(list)
    for query in queries:
        kept[query.chunk_id].append(query.text)
    table = Table("passage", "kept")
    for chunk in passages:
        text = f"{chunk.title}: {' '.join(chunk.text.split())[:200]}"
        table.add_row(Text(text), Text("\n".join(kept[chunk.id]) or "nothing"))
        table.add_section()
    facts = {
        "passages": [{"text": c.text, "title": c.title, "kept": kept[c.id]} for c in passages],
        "candidates": account.candidates,
        "kept": account.kept,
        "dropped": account.dropped,
    }
    dropped = ", ".join(f"{number} {reason}" for reason, number in account.dropped.items())
    console.result(facts, table)
    console.say(f"{account.kept} of {account.candidates} kept; dropped: {dropped or 'none'}")
