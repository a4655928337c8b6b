"""sentence-transformers' ``merge`` with the same signature: an average of models is streamed into
the first of them, without mergekit; every other method is mergekit's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import accumulate
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.merging import _unique_state_dict, _validate_models
from sentence_transformers.base.model import BaseModel

from ...errors import RefineFastError
from ...fuse import fuse_into
from ...fuse.into import check_fuse_into
from ...ops.lerp import lerp_

if TYPE_CHECKING:
    from mergekit.merge_methods import BatchOptions

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@torch.no_grad()
def merge(
    models: Sequence[str | Path | BaseModel],
    method: str = "linear",
    *,
    base_model: str | Path | BaseModel | None = None,
    parameters: dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = torch.float32,
    out_dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    batch_options: BatchOptions | None = None,
    **load_kwargs: Any,
) -> BaseModel:
    """Merges models; a drop-in for ``SentenceTransformer.merge`` (6.2), and for the ``merge`` of
    the class of the instances that are given.

    Method "linear" in float32 with weights >= 0, whose sum is scaled to 1, is the running mean
    ``out += w_k / (w_0 + ... + w_k) * (model_k - out)``. It needs no mergekit, and one model is in
    memory: the tensors of a folder are read from its safetensors files a few MiB at a time. Another
    input, as an instance or a Hub name, is loaded while its turn lasts. Everything else is left to
    sentence-transformers, which needs mergekit.

    Args:
        models: two or more instances, folders or Hub names. The first gives prompts, tokenizer and
            configuration.
        method: "linear", or another of mergekit.
        base_model: for the methods of mergekit that use one.
        parameters: {"weight": one for all, or one per model, in order or by index}.
        dtype: of the arithmetic; float32 for what is streamed.
        out_dtype: of the result's floating-point tensors; default: ``dtype``.
        device: of the arithmetic and of the result.
        batch_options: mergekit's.
        load_kwargs: for the class, where a folder or a name is loaded.

    Returns:
        A new model in evaluation mode; no input changes. ``save_pretrained`` writes it.

    Raises:
        ValueError: models that differ in more than their weights, as in sentence-transformers.
        TypeError: an input of another class.
        ImportError: mergekit is needed and missing.
    """
    if isinstance(models, str | Path) or len(models) < 2:
        found = repr(str(models)) if isinstance(models, str | Path) else len(models)
        raise ValueError(f"models must be a list of two or more models (got {found})")
    instances = [model for model in (*models, base_model) if isinstance(model, BaseModel)]
    model_class: type[BaseModel] = SentenceTransformer
    if instances and not isinstance(instances[0], SentenceTransformer):
        model_class = type(instances[0])
    out_type = _torch_dtype(dtype if out_dtype is None else out_dtype)
    shares = None
    if method == "linear" and base_model is None and batch_options is None and out_type is not None:
        shares = _shares(len(models), parameters or {})
    if shares is None or _torch_dtype(dtype) != torch.float32:
        return model_class.merge(
            models,
            method,
            base_model=base_model,
            parameters=parameters,
            dtype=dtype,
            out_dtype=out_dtype,
            device=device,
            batch_options=batch_options,
            **load_kwargs,
        )

    def load(model: str | Path | BaseModel) -> BaseModel:
        if isinstance(model, str | Path):
            model = model_class(str(model), device=str(device), **load_kwargs)
        if not isinstance(model, model_class):
            raise TypeError(
                f"models must be {model_class.__name__} instances, folders or Hub names"
                f" (got {type(model).__name__})"
            )
        return model

    merged = load(models[0])
    _validate_models([merged])
    if merged is models[0]:
        merged = deepcopy(merged).to(device)
    _unique_state_dict(merged, merged.device)  # refuses entries without data
    _cast(merged, torch.float32)
    for index, (model, share) in enumerate(zip(models[1:], shares, strict=True), start=1):
        if isinstance(model, str | Path) and load_kwargs.keys() <= {"local_files_only"}:
            skeleton = _skeleton(model_class, Path(model), merged, load_kwargs)
            if skeleton is not None:
                _check_match(merged, skeleton, index)
                fuse_into(merged, model, share)
                continue
        other = load(model)
        _check_match(merged, other, index)
        _interpolate(merged, other, share, index)
    assert out_type is not None
    _cast(merged, out_type)
    merged._model_card_text = None  # the parents' training and scores are not the product's
    merged.model_card_data = merged.model_card_data_class(local_files_only=True)
    merged.model_card_data.register_model(merged)
    return merged.eval()


def _torch_dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by its name; None for what sentence-transformers must judge."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    return found if found in _DTYPES else None


def _shares(count: int, parameters: Mapping[str, Any]) -> list[float] | None:
    """``w_k / (w_0 + ... + w_k)`` for every model but the first; None where mergekit must decide:
    other parameters, negative weights, weights that are wrong."""
    if parameters.keys() - {"weight", "normalize"} or not parameters.get("normalize", True):
        return None
    given = parameters.get("weight", 1.0)
    if isinstance(given, Mapping):
        given = [given[i] for i in range(count)] if given.keys() == set(range(count)) else None
    weights = [given] * count if isinstance(given, Real) else given
    if (
        not isinstance(weights, list | tuple)
        or len(weights) != count
        or not all(isinstance(w, Real) and 0 <= float(w) < math.inf for w in weights)
        or not sum(weights)
    ):
        return None
    totals = accumulate(weights)
    return [float(w / total) if total else 0.0 for w, total in zip(weights, totals, strict=True)][
        1:
    ]


def _cast(model: BaseModel, dtype: torch.dtype) -> None:
    """Gives every floating-point tensor that is saved this dtype."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _skeleton(
    model_class: type[BaseModel], folder: Path, merged: BaseModel, load_kwargs: dict[str, Any]
) -> BaseModel | None:
    """The folder's model without its weights, for the checks; None where ``fuse_into`` does not
    replace loading: no safetensors, other names, ties stored apart, integers, which must agree."""
    if not folder.is_dir() or not all(t.is_floating_point() for t in merged.state_dict().values()):
        return None
    try:
        if check_fuse_into(merged, folder):
            return None
    except RefineFastError:
        return None
    return model_class(str(folder), model_kwargs={"device_map": "meta"}, **load_kwargs)


def _check_match(merged: BaseModel, other: BaseModel, index: int) -> None:
    """Raises ValueError unless ``other``, models[index], differs only in its weights."""
    _validate_models([*[merged] * index, other])  # the messages name models by position
    if _tied(merged) != _tied(other):
        raise ValueError(f"model {index} has other tensors or other tied weights than model 0")


def _tied(model: BaseModel) -> dict[str, str]:
    """For every name in the state dict the first name of the same tensor."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def _interpolate(merged: BaseModel, other: BaseModel, share: float, index: int) -> None:
    """``merged += share * (other - merged)``, tied tensors once; integers must be equal."""
    ours, _ = _unique_state_dict(merged, merged.device)
    theirs, _ = _unique_state_dict(other, merged.device)
    for name, tensor in ours.items():
        partner = theirs[name]
        if tensor.shape != partner.shape:
            shapes = f"{list(tensor.shape)} in model 0 and {list(partner.shape)} in model {index}"
            raise ValueError(f"tensor {name!r} is {shapes}")
        if tensor.is_floating_point() and partner.is_floating_point():
            lerp_(tensor, partner.to(tensor.dtype), share)
        elif tensor.dtype != partner.dtype or not torch.equal(tensor, partner):
            raise ValueError(f"the integers of {name!r} differ between models 0 and {index}")
