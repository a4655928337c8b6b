"""The model card: its YAML head, its tables, the licence of the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt
from report_samples import HOSTILE, answered

from refine_fast.pipeline.reporting.model_card import model_card


def card(
    base: Path,
    name: str = "org/my_model",
    *,
    weight: float = 0.35,
    chosen: bool = True,
    twin: bool = False,
) -> str:
    systems = {
        system: {
            "in_domain": answered(share, 400),
            "ood:a|b": answered(0.5, 300),
        }
        for system, share in (("BM25", 0.5), ("base", 0.6), ("fine-tuned", 0.8), ("fused", 0.7))
    }
    recipe = {"loss": "InfoNCE | *t*"}
    return model_card(base, name, weight, recipe, systems, chosen=chosen, twin=twin)


def head_and_body(text: str) -> tuple[dict[str, object], str]:
    empty, head, body = text.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), body


def test_model_card(tmp_path: Path) -> None:
    head, body = head_and_body(card(tmp_path))
    assert head == {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "refine", "model-fusion"],
        "base_model": "org/my_model",
    }
    for words in (
        "`base + 0.35 * (tuned - base)`: `org/my_model`",
        'model = SentenceTransformer("path/to/this/folder")\n',
        "On queries that were not trained on (400 queries):",
        "| fused | 0.700 | 0.700 | 0.700 | 0.700 | 0.700 |",
        "recall@3, base to fused: +10.0 points [",
        ": improved.",
        "Out of domain: a\\|b (300 queries):",
        "recall@3, base to fused: +0.0 points [+0.0, +0.0]: no measurable change.",
        "| loss | InfoNCE \\| \\*t\\* |",
    ):
        assert words in body, words
    page = MarkdownIt("commonmark").enable("table").render(body)
    assert page.count("<table>") == 3
    kept = card(tmp_path, weight=0)
    assert "`org/my_model` as it was: no fine-tuned model was shown to be better" in kept
    assert "interpolated" not in kept
    given = card(tmp_path, weight=0, chosen=False)
    assert "`org/my_model` as it was: its weight was given as 0. Made by" in given
    twin = card(tmp_path, twin=True)
    assert "normalize(0.35 * e_tuned + 0.65 * e_frozen)" in twin
    assert '("path/to/this/folder", trust_remote_code=True)\n' in twin


def test_model_card_survives_any_name(tmp_path: Path) -> None:
    for name in (*HOSTILE, "a: b", "'", "no", "---", "- x"):
        head, body = head_and_body(card(tmp_path, name))
        assert head["base_model"] == name
        page = MarkdownIt("commonmark", {"html": False}).enable("table").render(body)
        assert page.count("<h1>") == 1
        assert page.count("<h2>") == 2
        assert "<script" not in page
        assert "<a" not in page
        assert "<img" not in page


@pytest.mark.parametrize(
    ("readme", "fields"),
    [
        ("---\nlicense: mit\ntags: [x]\n---\nHello", {"license": "mit"}),
        (
            "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://e.org\n---\n",
            {"license": "other", "license_name": "gemma", "license_link": "https://e.org"},
        ),
        ("no head", {}),
        ("---\n: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: mit\ndate: 2024-02-30\n---\n", {}),  # no day
        (None, {}),
    ],
)
def test_model_card_names_the_licence_of_the_base(
    tmp_path: Path, readme: str | None, fields: dict[str, str]
) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    head, _ = head_and_body(card(tmp_path))
    assert {name: value for name, value in head.items() if name.startswith("license")} == fields
