"""An encoder as a graph that serving stacks run, in a folder that needs neither torch nor this
package.

The graph has two inputs and two outputs::

    input_ids, attention_mask (n, t) int64
    -> last_hidden_state (n, t, h), sentence_embedding (n, d) float32

``sentence_embedding`` is what ``encode`` returns: pooling, the encoder's further modules, its
dimensions and its normalization are part of the graph. ``last_hidden_state`` is for servers that
pool themselves, as sentence-transformers does; the folder has the configuration of its modules.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...errors import RefineFastError
from ...files import walk
from .encode import compares_by_cosine

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("last_hidden_state", "sentence_embedding")

OPSET = 18
"""The version of ONNX's operators that torch's exporter translates to; onnxruntime has it since
1.14."""

BATCH = 32
"""Texts that ``Graph.encode`` runs at a time."""

_WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json", ".bin.index.json")
_OTHER_GRAPHS = ("onnx/", "openvino/")

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""input_ids, attention_mask -> sentence_embedding."""


class _Pooled(torch.nn.Module):
    """The encoder from tokens to both outputs."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(model.children())
        self.dimensions = model.truncate_dim
        self.normalized = compares_by_cosine(model)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.parts[0]({"input_ids": input_ids, "attention_mask": attention_mask})
        tokens = features["token_embeddings"]
        for part in self.parts[1:]:
            features = part(features)
        vectors = features["sentence_embedding"][:, : self.dimensions]
        if self.normalized:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return tokens, vectors


def check_graphable(model: SentenceTransformer) -> None:
    """Refuses an encoder that is not one transformer with modules behind it.

    Raises:
        RefineFastError: with what the encoder has instead.
    """
    from sentence_transformers.base.modules import InputModule, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    first: Any = model[0]
    problem = None
    if not isinstance(first, Transformer) or first.module_output_name != "token_embeddings":
        problem = f"this one reads texts with a {type(first).__name__}"
    elif "message" in first.modality_config:
        problem = "this one reads texts through a chat template"
    elif inner := [part for part in list(model.children())[1:] if isinstance(part, InputModule)]:
        problem = f"this one has a {type(inner[0]).__name__} in the middle"
    elif not hasattr(first.tokenizer, "backend_tokenizer"):
        problem = "this one's tokenizer is Python code"
    elif any(model.prompts.values()) and any(
        isinstance(part, Pooling) and not part.include_prompt for part in model.children()
    ):
        problem = "this one leaves its prompt out of pooling, and a graph does not know the prompt"
    if problem is not None:
        raise RefineFastError(
            f"export: a graph needs an encoder of one transformer and what follows it, and "
            f"{problem}; serve it with sentence-transformers instead."
        )


def write_onnx(model: SentenceTransformer, path: Path) -> None:
    """Writes the graph of an encoder on the CPU, in float32.

    Raises:
        RefineFastError: if torch cannot export the encoder; the message gives its reason.
        ModuleNotFoundError: without onnx or onnxscript.
    """
    import onnxscript  # noqa: F401 - torch would report it missing in a sentence of its own

    texts = ["a few words", "and a few words more than these"]  # with padding
    first: Any = model[0]
    tokens: dict[str, Any] = first.preprocess(texts)
    axes = {0: "batch", 1: "sequence"}
    try:
        with _exporting(first.model):
            torch.onnx.export(
                _Pooled(model).eval(),
                tuple(tokens[name] for name in INPUTS),
                str(path),
                input_names=INPUTS,
                output_names=OUTPUTS,
                dynamic_shapes=(axes, axes),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,  # above 2 GB the weights are beside the graph all the same
                verbose=False,
            )
    except ModuleNotFoundError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:200]
        raise RefineFastError(
            f"export: torch {torch.__version__} cannot export this encoder "
            f"({type(cause).__name__}: {reason}); serve it with sentence-transformers instead."
        ) from error


@contextmanager
def _exporting(network: Any) -> Iterator[None]:
    """Attention as plain products, since torch cannot trace the views that some networks (T5) take
    of its fused attention; and no remark on the steps of the export, on stdout or in a log."""
    fused = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        with _quiet("torch.onnx"), redirect_stdout(io.StringIO()):
            yield
    finally:
        network.set_attn_implementation(fused)


@contextmanager
def _quiet(logger: str | None) -> Iterator[None]:
    """Only errors of a logger; None: of the root logger."""
    chosen = logging.getLogger(logger)
    level = chosen.level
    chosen.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chosen.setLevel(level)


def write_files(model: SentenceTransformer, source: Path, folder: Path) -> None:
    """Copies what is beside the weights of the transformer: configuration, prompts, further
    modules. tokenizer.json also says where a text is cut and how a batch is padded.

    Args:
        model: the encoder, loaded from ``source``.
        source: its folder.
        folder: an empty folder.
    """
    place = _transformer_folder(source)
    for file, name in walk(source):
        weights = file.parent == source / place and name.endswith(_WEIGHTS)
        if weights or name == "README.md" or name.startswith(_OTHER_GRAPHS):
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    _batching_tokenizer(model).save(str(folder / "tokenizer.json"))


def _transformer_folder(source: Path) -> str:
    modules = source / "modules.json"
    if not modules.is_file():
        return ""
    return str(json.loads(modules.read_text(encoding="utf-8"))[0]["path"])


def _batching_tokenizer(model: SentenceTransformer) -> Tokenizer:
    from tokenizers import Tokenizer

    own: Any = model.tokenizer
    tokenizer = Tokenizer.from_str(own.backend_tokenizer.to_str())
    if own.model_max_length < 1e9:  # transformers has 1e30 where there is no limit
        tokenizer.enable_truncation(own.model_max_length, direction=own.truncation_side)
    tokenizer.enable_padding(
        direction=own.padding_side,
        pad_id=own.pad_token_id,
        pad_type_id=own.pad_token_type_id,
        pad_token=own.pad_token,
    )
    return tokenizer


@dataclass(frozen=True)
class Graph:
    """An exported encoder, read from the files of its folder alone."""

    tokenizer: Tokenizer
    run: Run

    @classmethod
    def open(cls, folder: Path, run: Run) -> Graph:
        """The folder's tokenizer, and a graph that ``onnx_run`` or ``openvino_run`` has loaded."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), run)

    @property
    def max_tokens(self) -> int | None:
        """Where a text is cut; None: nowhere."""
        cut = self.tokenizer.truncation
        return None if cut is None else int(cut["max_length"])

    def encode(self, texts: Sequence[str], prompt: str = "") -> np.ndarray:
        """(n, d) float32 vectors, in the order of the texts, each with ``prompt`` before it."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        blocks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
        vectors = np.concatenate([self._run([prompt + texts[i] for i in b]) for b in blocks])
        found = np.empty_like(vectors)
        found[order] = vectors
        return found

    def _run(self, texts: list[str]) -> np.ndarray:
        encoded = self.tokenizer.encode_batch(texts)
        ids = np.array([text.ids for text in encoded], np.int64)
        return self.run(ids, np.array([text.attention_mask for text in encoded], np.int64))


def onnx_run(path: Path) -> Run:
    """The graph in onnxruntime, on the CPU with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda *inputs: session.run(OUTPUTS[1:], dict(zip(INPUTS, inputs, strict=True)))[0]


def openvino_run(path: Path) -> Run:
    """The graph in OpenVINO, on the CPU in float32 with torch's number of threads."""
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(path), "CPU", exact)
    return lambda *inputs: compiled(dict(zip(INPUTS, inputs, strict=True)))[OUTPUTS[1]]


def write_int8(source: Path, path: Path) -> None:
    """Writes a graph with weights of 8 bits; activations are quantized as they come (onnxruntime's
    dynamic quantization).

    The weights are unsigned, since products of unsigned and signed bytes saturate on CPUs without
    VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet(None):  # it advises a step that fuses convolutions
        quantize_dynamic(str(source), str(path), weight_type=QuantType.QUInt8, per_channel=True)


def write_openvino(source: Path, path: Path) -> None:
    """Writes an ONNX graph as OpenVINO's: ``path``, and its weights in float32 beside it."""
    import openvino

    openvino.save_model(openvino.convert_model(str(source)), str(path), compress_to_fp16=False)
