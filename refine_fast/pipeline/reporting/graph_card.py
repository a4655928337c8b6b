"""The README of an exported graph: how to call it, and how far its vectors are the encoder's."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from markupsafe import Markup

from ..encoder.encode import Role
from .loss import Loss
from .templating import markdown_template


def graph_card(
    format: str,
    graph: str,
    *,
    prompts: Mapping[Role, str],
    tokens: int | None,
    unit: bool,
    difference: float,
    similarity: float,
    loss: Loss | None,
) -> str:
    """The README.md of the folder.

    Args:
        format: onnx, int8 or openvino.
        graph: path of the graph in the folder.
        prompts: what goes before a "query" and before a "document"; empty: nothing.
        tokens: at which a text is cut; None: it is not.
        unit: whether the vectors have unit length.
        difference: the largest one between the graph's vectors and the encoder's.
        similarity: the mean cosine of the two.
        loss: of int8, where the run has held-out queries.
    """
    return markdown_template("graph_card.md.jinja").render(
        format=format,
        graph=graph,
        prompts={role: prompt and repr(prompt) for role, prompt in prompts.items()},
        tokens=tokens,
        unit=unit,
        difference=f"{difference:.1g}",
        similarity=f"{similarity:.4f}",
        loss=loss,
        rows={} if loss is None else {n: map(Markup, row) for n, row in loss.rows().items()},
        version=version("refine-fast"),
    )
