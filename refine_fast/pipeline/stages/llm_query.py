"""query, with ``--llm``: training queries that a language model writes, and their split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...files import read_json, write_json
from ..artifacts import ACCOUNT, CHUNKS, REPLIES
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..encoder.encode import encode
from ..encoder.load import load_encoder
from ..queries.llm import Account, generate_queries
from ..queries.query import Query
from .llm_calls import calls_shown, show_missing, spent_in_words, to_ask_again
from .query import made_queries, write_split

if TYPE_CHECKING:
    from ..context import RunContext


def run(context: RunContext, folder: Path) -> None:
    """Writes the split queries, and the account of calls, tokens, cost and drops."""
    chunks = read_records(context.path(CHUNKS), Chunk)
    queries, account = _ask(context, chunks, folder)
    write_json(folder / ACCOUNT, account.to_dict())
    queries += made_queries(context, chunks, context.config.made_kinds)
    write_split(context, folder, chunks, queries)


def unanswered(context: RunContext) -> list[str]:
    """Why the stage must run again although its inputs are unchanged: requests without a
    reply."""
    failed = to_ask_again(read_json(context.path(ACCOUNT)) or {})
    return [f"{failed} requests without a reply"] if failed else []


def _ask(context: RunContext, chunks: list[Chunk], folder: Path) -> tuple[list[Query], Account]:
    """Asks the model. The encoder is loaded only if a limit or a filter needs it; the chunks'
    embeddings stay in the stage's folder until it is finished."""
    settings = context.config.llm_settings()
    assert settings is not None
    console = context.console

    def embed(
        texts: list[str], role: Literal["query", "document"], out: Path | None = None
    ) -> np.ndarray:
        model = load_encoder(context.encoder, trust_remote_code=context.trust_remote_code)
        with console.progress(f"embedding {len(texts):,} texts") as advance:
            return encode(model, texts, role=role, bf16=context.bf16, out=out, progress=advance)

    embeddings = None
    if settings.is_limited or settings.round_trip:
        passages = folder / "passages.npy"
        if not passages.exists():
            embed([chunk.passage for chunk in chunks], "document", passages)
        embeddings = np.load(passages, mmap_mode="r")
    with calls_shown(console, settings, "asking the model") as watch:
        queries, account = generate_queries(
            chunks,
            settings,
            context.path(REPLIES),
            embeddings=embeddings,
            encode=embed if settings.round_trip else None,
            watch=watch,
        )
    console.say(f"  {_summary(account.to_dict())}")
    done = f"{account.replied:,} of {account.chunks:,}"
    show_missing(console, account, asked="chunks", done=done, lack="reply")
    return queries, account


def _summary(account: Mapping[str, Any]) -> str:
    """The account in one sentence."""
    drops = sorted(account["dropped"].items(), key=lambda item: -item[1])
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in drops)
    unjudged = f" ({account['unjudged']:,} not judged)" if account["unjudged"] else ""
    return (
        f"{account['kept']:,} queries{unjudged} from {account['replied']:,} replies, "
        f"{account['reused']:,} of them reused; {spent_in_words(account)}; "
        f"{account['replies_per_second']:.1f} replies a second; dropped: {dropped or 'none'}"
    )
