"""``refine-fast doctor``: what works on this machine. Every check runs what it reports."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from ... import triton_kernels
from ..._native import available_isas, isa
from ...errors import RefineFastError
from ...ops import band_topk_cuda
from ..cluster.object_path import found_drivers
from ..cluster.ray_cluster import found_cluster
from ..console import Console
from ..encoder.encode import has_fast_bf16
from ..encoder.load import device, encoder_folder
from ..encoder.options import EncoderOptions
from ..encoder.prepare import prepare_encoder
from ..preflight import try_encoder

if TYPE_CHECKING:
    from ..queries.llm import LLMSettings

DISTRIBUTION = "refine-fast"


def show_health(
    model: str,
    llm: LLMSettings | None,
    console: Console,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Shows one row for each check: what, whether it works, and what was found or is to be done.

    Args:
        model: the encoder to try: a folder, a Hugging Face name or minilm.
        llm: the endpoint to probe, with the options of its requests; None: none.
        console: where the rows go.
        trust_remote_code: whether to run Python code in the encoder's folder.

    Raises:
        RefineFastError: if the encoder does not work.
    """
    rows = list(check(model, trust_remote_code=trust_remote_code))
    if llm:
        rows += _endpoint_rows(llm)
    table = Table("", "", "found")
    for what, works, found in rows:
        table.add_row(what, Text("ok", "green") if works else Text("no", "yellow"), found)
    console.result({what: {"works": works, "found": found} for what, works, found in rows}, table)
    if not {what: works for what, works, _ in rows}["encoder"]:
        raise RefineFastError(f"doctor: the encoder {model} does not work here; see its row.")


def check(model: str, *, trust_remote_code: bool = False) -> Iterator[tuple[str, bool, str]]:
    """(what, whether it works, what was found)."""
    yield (
        "python",
        True,
        f"{platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores",
    )
    yield "cpu kernels", True, f"{isa()} of {', '.join(available_isas())}"
    yield "torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        name, memory = (
            torch.cuda.get_device_name(),
            torch.cuda.get_device_properties(0).total_memory,
        )
        yield "cuda", True, f"{name}, {memory / 2**30:.0f} GiB"
        without = band_topk_cuda.missing_requirement(torch.device("cuda"))
        yield "cuda band_topk", *_on_gpu(without, "searches on the CPU")
        without = triton_kernels.missing_requirement()
        yield "cuda info_nce", *_on_gpu(without, "runs its plain torch reference")
    else:
        yield "cuda", False, "no device found; everything runs on the CPU"
    fast = has_fast_bf16(device())
    yield (
        "bf16",
        fast,
        "supported by the hardware" if fast else "not supported by the hardware; fp32 is used",
    )
    for extra in extras():
        packages = packages_of(extra)
        missing = [str(package) for package in packages if not _is_installed(package)]
        found = ", ".join(package.name for package in packages)
        if missing:
            found = f"pip install 'refine-fast[{extra}]' for {', '.join(missing)}"
        yield f"extra {extra}", not missing, found
    if find_spec("ray") is not None:
        yield "engine ray", *_tried(found_cluster)
        yield "object storage", *found_drivers()
    yield "memory", True, _memory()
    free = shutil.disk_usage(Path.cwd()).free
    yield "disk", free > 2**30, f"{free / 2**30:.1f} GiB free in {Path.cwd()}"
    yield "encoder", *_tried(lambda: _encoder(model, trust_remote_code))


def _on_gpu(missing: str | None, instead: str) -> tuple[bool, str]:
    return missing is None, "has its kernels" if missing is None else f"{instead}: {missing}"


def extras() -> list[str]:
    """The extras of this package that users install."""
    provided = metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    return [extra for extra in provided if extra != "test"]


def packages_of(extra: str) -> list[Requirement]:
    """The packages that an extra adds on this platform, those of extras that it names too."""
    packages: list[Requirement] = []
    for requirement in map(Requirement, requires(DISTRIBUTION) or ()):
        marker = requirement.marker
        if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            requirement.marker = None
            own = requirement.name == DISTRIBUTION
            nested = (package for name in requirement.extras for package in packages_of(name))
            packages += nested if own else [requirement]
    return packages


def _is_installed(package: Requirement) -> bool:
    try:
        return package.specifier.contains(version(package.name), prereleases=True)
    except PackageNotFoundError:
        return False


def _encoder(name: str, trust_remote_code: bool) -> str:
    options = EncoderOptions(trust_remote_code=trust_remote_code)
    folder = prepare_encoder(encoder_folder(name), options)
    model = try_encoder(folder, trust_remote_code=trust_remote_code)
    prompts = ", ".join(key for key, prompt in model.prompts.items() if prompt) or "none"
    dimensions = model.truncate_dim or model.get_embedding_dimension()
    return (
        f"{name}: {dimensions} dimensions, {model.max_seq_length} tokens, prompts: {prompts}, "
        f"{model.similarity_fn_name} similarity"
    )


def _tried(work: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, work()
    except (RefineFastError, ModuleNotFoundError, OSError) as error:
        return False, str(error)


def _memory() -> str:
    try:
        import psutil
    except ImportError:
        return "unknown without psutil"
    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"


def _endpoint_rows(settings: LLMSettings) -> Iterator[tuple[str, bool, str]]:
    """(what, whether it works, what was found) for each model of each endpoint."""
    from ..queries.llm import probe

    asked = product(settings.urls, settings.models)
    for (url, model), report in zip(asked, probe(settings), strict=True):
        what = f"llm {model}" if len(settings.urls) == 1 else f"llm {model} at {url}"
        if report.problem:
            yield what, False, report.problem
            continue
        served = {
            True: "served",
            False: "answers, though the endpoint does not list it",
            None: "answers",
        }[report.served]
        modes = ", ".join(f"{mode} {answer}" for mode, answer in report.structured.items())
        context = (
            f"{report.context:,} tokens of context" if report.context else "context length unknown"
        )
        yield (
            what,
            True,
            f"{served}; accepts {report.form}; {modes}; {context}; "
            f"{report.tokens_per_second:.0f} tokens/s",
        )
