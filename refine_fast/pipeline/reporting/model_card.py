"""The model card: what the fused model is, how it was made, what it gained and what it forgot."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..evaluation.metrics import Scores
from ..evaluation.significance import gain
from .format import points

SHOWN = ("recall@1", "recall@3", "recall@10", "ndcg@10", "mrr@10")


def model_card(
    base: Path,
    base_name: str,
    weight: float,
    recipe: Mapping[str, Any],
    systems: Mapping[str, Mapping[str, Scores]],
    *,
    twin: bool,
) -> str:
    """README.md of the fused model. ``systems``: system name -> set name -> scores, "base" and "fused" among them; ``twin``: of
    embeddings, not of weights."""
    head = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "refine", "model-fusion"],
        "base_model": base_name,
        **({"license": licence} if (licence := _licence(base)) else {}),
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {base_name}, adapted to one collection of documents",
        "",
        *(_of_embeddings if twin else _of_weights)(base_name, weight),
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("path/to/this/folder"{", trust_remote_code=True" if twin else ""})',
        'documents = model.encode_document(["..."])',
        'queries = model.encode_query(["..."])',
        "scores = model.similarity(queries, documents)",
        "```",
        "",
        "## Results",
    ]
    for name, before in systems["base"].items():
        if name == "dev":
            continue
        title = (
            "On queries that were not trained on"
            if name == "in_domain"
            else f"Out of domain: {name.removeprefix('ood:')}"
        )
        lines += ["", f"{title} ({len(before.per_query['recall@3'])} queries):", ""]
        lines += ["| | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
        for system, scores in systems.items():
            lines.append(
                f"| {system} | "
                + " | ".join(f"{scores[name].metrics[metric]:.3f}" for metric in SHOWN)
                + " |"
            )
        change = gain(before.per_query["recall@3"], systems["fused"][name].per_query["recall@3"])
        lines += ["", f"recall@3, base to fused: {points(change)}: {change.verdict}."]
    lines += ["", "## Recipe", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in recipe.items()]
    return "\n".join(lines) + "\n"


def _of_weights(base_name: str, weight: float) -> list[str]:
    return [
        f"Every weight is `base + {weight:g} * (tuned - base)`: `{base_name}` interpolated with a contrastive fine-tune of it,",
        f"as in REFINE (arXiv 2410.12890), by refine_fast {version('refine-fast')}. Pooling, normalization, prompts and tokenizer are the base's.",
    ]


def _of_embeddings(base_name: str, weight: float) -> list[str]:
    return [
        f"Every embedding is `normalize({weight:g} * e_tuned + {1 - weight:g} * e_frozen)`: a contrastive fine-tune (`tuned/`) beside",
        f"`{base_name}` as it was (`frozen/`), this sum in the loss too, as in REFINE (arXiv 2410.12890), by refine_fast {version('refine-fast')}.",
        "Every text is encoded twice. The model needs the package refine-fast, and sentence-transformers the flag below, as with every",
        "class that is not its own.",
    ]


def _licence(base: Path) -> str | None:
    """What the base's own card says."""
    card = base / "README.md"
    parts = (
        card.read_text(encoding="utf-8", errors="replace").split("---", 2) if card.is_file() else []
    )
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 else None
    except yaml.YAMLError:
        head = None
    return head.get("license") if isinstance(head, dict) else None
