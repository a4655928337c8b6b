"""The transformers of an encoder, and their layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import RefineFastError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from torch import nn


def transformers_of(model: nn.Module) -> list[Any]:
    """The transformers of an encoder, without those that are part of another one."""
    from transformers import PreTrainedModel

    found: list[Any] = []
    inner: set[nn.Module] = set()
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part not in inner:
            found.append(part)
            inner.update(part.modules())
    return found


def freeze_but_last_layers(model: SentenceTransformer, count: int) -> None:
    """Freezes each transformer except its last ``count`` layers.

    The backward pass ends at the first layer that is trained, so that a step takes less time and
    keeps fewer activations. What follows the transformer, such as a projection, is trained.

    Args:
        model: the encoder, changed in place.
        count: at least 1.

    Raises:
        RefineFastError: if the encoder has no transformer, or one with ``count`` layers or fewer.
    """
    transformers = transformers_of(model)
    if not transformers:
        raise RefineFastError(
            "train_layers: the encoder has no transformer; leave out --train-layers."
        )
    for transformer in transformers:
        layers = _layers(transformer)
        if count >= len(layers):
            raise RefineFastError(
                f"train_layers: {count} must be less than the encoder's {len(layers)} layers; "
                "leave out --train-layers to train all of it."
            )
        transformer.requires_grad_(False)
        for layer in layers[len(layers) - count :]:
            layer.requires_grad_(True)


def _layers(transformer: nn.Module) -> Any:
    """The stack of layers: the list of modules that holds the most parameters."""
    from torch import nn

    stacks = [part for part in transformer.modules() if isinstance(part, nn.ModuleList)]
    return max(
        stacks,
        key=lambda stack: sum(p.numel() for p in stack.parameters()),
        default=nn.ModuleList(),
    )
