"""What a run is asked to do: one dataclass, from which the flags, the YAML file and the messages about bad values all follow."""

# ruff: noqa: RUF009 - _option is dataclasses.field with its metadata
from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RefineFastError
from .config_values import (
    Parse,
    band,
    beir_folders,
    choice,
    either,
    encoder,
    existing_path,
    integer,
    memory_size,
    mix,
    names,
    path,
    real,
    text,
    weights,
    yes_or_no,
)
from .encoder.load import DEFAULT_ENCODER

if TYPE_CHECKING:
    from .queries.llm import LLMSettings


DEMO_CHUNKS = 700
"""Of Python's documentation, where no documents are given: a run of a few minutes."""


QUICK = {"limit": 300, "max_steps": 10, "ood_passages": 300, "curve": (0.0, 1.0)}
"""What --quick sets, unless it is given: every stage in about a minute, to see that a set-up works; its figures mean little."""


_FOR_A_MODEL = (
    "prompt", "max_calls", "max_tokens", "max_cost", "price_in", "price_out", "duplicates", "round_trip", "judge", "judge_prompt"
)  # fmt: skip
"""With llm_*, the fields that say nothing unless a language model writes the queries."""


def _option(default: Any, parse: Parse, help: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"parse": parse, "help": help, "metavar": metavar})


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result. Each field is a flag (``queries_per_chunk`` is ``--queries-per-chunk``) and a key of the
    YAML file; its parser takes either form and refuses the rest with a reason and a remedy."""

    out: Path = _option(
        Path(), path, "the run folder: made if it is missing, resumed if it is there", "FOLDER"
    )
    docs: Path | None = _option(
        None,
        either(None, existing_path),
        "a folder of .txt, .md, .html and .pdf files, JSONL {text, title}, a BEIR folder or a saved dataset",
        "DOCS",
    )
    model: str = _option(
        DEFAULT_ENCODER,
        encoder,
        "the encoder to adapt: a folder, a Hugging Face name, or minilm (comes along)",
        "NAME",
    )
    limit: int | None = _option(
        None,
        either(None, integer(2)),
        "use at most this many chunks, whole documents drawn by the seed",
        "N",
    )
    chunk_tokens: int = _option(
        256,
        integer(32),
        "longest chunk, in the encoder's own tokens; never more than it reads",
        "N",
    )
    seed: int = _option(0, integer(0, 2**32 - 1), "same inputs and seed, same outputs", "N")

    queries: Path | None = _option(
        None,
        either(None, existing_path),
        "your own queries: JSONL {text, doc_id}, or a BEIR folder (train)",
        "FILE",
    )
    queries_per_chunk: int = _option(2, integer(1), "synthetic queries made for each chunk", "N")
    llm: str | None = _option(
        None,
        either(None, text),
        "have a model write the queries: an OpenAI-compatible URL, or transformers",
        "URL",
    )
    llm_model: tuple[str, ...] = _option(
        (), names, "the model's name; several share the chunks", "NAME,..."
    )
    llm_key_env: str = _option(
        "OPENAI_API_KEY",
        text,
        "environment variable that holds the key, if the endpoint wants one",
        "NAME",
    )
    llm_mix: tuple[tuple[str, float], ...] = _option(
        (("question", 0.5), ("keywords", 0.2), ("claim", 0.15), ("how-to", 0.15)),
        mix,
        "kinds of query and their shares",
        "KIND=SHARE,...",
    )
    llm_temperature: float | None = _option(
        None, either(None, real(0)), "sampling temperature; left out: the server's own", "T"
    )
    llm_reply_tokens: int = _option(512, integer(16), "longest reply", "N")
    llm_concurrency: int = _option(
        64, integer(1), "most calls at a time; fewer where the server asks for it", "N"
    )
    llm_timeout: float = _option(
        120.0, real(0, low_included=False), "seconds that a call may take", "SECONDS"
    )
    prompt: Path | None = _option(
        None,
        either(None, existing_path),
        "your own prompt; 'refine-fast prompt' prints the one to start from",
        "FILE",
    )
    max_calls: int | None = _option(
        None,
        either(None, integer(1)),
        "stop after this many calls, over all starts in the run folder",
        "N",
    )
    max_tokens: int | None = _option(None, either(None, integer(1)), "... tokens, in and out", "N")
    max_cost: float | None = _option(
        None, either(None, real(0, low_included=False)), "... cost, by the prices", "AMOUNT"
    )
    price_in: float = _option(0.0, real(0), "price of a million tokens in the prompts", "AMOUNT")
    price_out: float = _option(0.0, real(0), "price of a million tokens in the replies", "AMOUNT")
    duplicates: str = _option(
        "near",
        choice("near", "exact", "keep"),
        "duplicates of a model's queries to drop: near (and exact), exact; or keep",
        "HOW",
    )
    round_trip: int = _option(
        0,
        integer(0),
        "keep a query only if the encoder finds its chunk in the top N; 0 keeps all",
        "N",
    )
    judge: bool = _option(
        False,
        yes_or_no,
        "ask the model which queries their chunk answers, and drop the others: yes or no",
        "YES",
    )
    judge_prompt: Path | None = _option(
        None,
        either(None, existing_path),
        "your own; start from what 'refine-fast prompt judge' prints",
        "FILE",
    )
    held_out: float = _option(
        0.2, real(0, 0.5, low_included=False), "share of the documents kept for evaluation", "SHARE"
    )

    band: tuple[float, float] | Literal["auto"] = _option(
        (0.5, 0.7),
        either("auto", band),
        "cosines of hard negatives; auto fits them to the encoder",
        "LOW,HIGH",
    )
    skip: int = _option(
        5, integer(0), "leave out this many most similar documents, then apply the band", "N"
    )
    negatives: int = _option(
        1, integer(0), "hard negatives per query; 0 trains on in-batch negatives alone", "N"
    )
    select: str = _option(
        "hardest",
        choice("hardest", "random"),
        "which of the documents in the band: hardest or random",
        "HOW",
    )

    epochs: float = _option(1.0, real(0, low_included=False), "passes over the queries", "N")
    max_steps: int | None = _option(
        None, either(None, integer(1)), "stop training after this many steps", "N"
    )
    batch_size: int = _option(
        64,
        integer(2),
        "queries in a batch; each sees the documents of all others as negatives",
        "N",
    )
    lr: float = _option(1e-4, real(0, low_included=False), "peak learning rate", "RATE")
    warmup: float = _option(
        0.1, real(0, 1), "share of the steps that the learning rate rises", "SHARE"
    )
    temperature: float = _option(
        0.02, real(0, low_included=False), "temperature of the contrastive loss", "TAU"
    )
    precision: str = _option(
        "auto",
        choice("auto", "fp32", "bf16"),
        "fp32, bf16 or auto: bf16 where the hardware has it",
        "TYPE",
    )
    memory: int | None = _option(
        None,
        either(None, memory_size),
        "memory that training may take, such as 8GB; more is faster (default: 8 sequences at a time)",
        "SIZE",
    )

    weight: float | Literal["auto"] = _option(
        0.35,
        either("auto", real(0, 1)),
        "share of the fine-tuned encoder; auto chooses it on held-out queries",
        "W",
    )
    curve: tuple[float, ...] = _option(
        (0.0, 0.35, 0.5, 0.75, 1.0),
        weights,
        "fusion weights to evaluate besides --weight",
        "W,W,...",
    )
    fusion: str = _option(
        "weights",
        choice("weights", "embeddings"),
        "what is interpolated; embeddings: a frozen twin, in the loss and when serving",
        "HOW",
    )
    ood: tuple[Path, ...] | None = _option(
        None,
        either(None, beir_folders),
        "BEIR folder to check for forgetting, repeatable; none: no check (default: Python's documentation)",
        "DIR",
    )
    ood_passages: int = _option(
        1000, integer(10), "reduce larger out-of-domain sets to this many passages", "N"
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            try:
                object.__setattr__(self, item.name, item.metadata["parse"](value))
            except ValueError as reason:
                raise RefineFastError(f"{item.name}: {_shown(value)} {reason}.") from None
        self.llm_settings()  # checks them
        for item in dataclasses.fields(self) if self.llm is None else ():
            if (item.name.startswith("llm_") or item.name in _FOR_A_MODEL) and getattr(
                self, item.name
            ) != item.default:
                raise RefineFastError(
                    f"{item.name}: there is no model to ask; add --llm URL, or leave it out."
                )
        if self.fusion == "embeddings" and self.weight == "auto":
            raise RefineFastError(
                "weight: auto chooses it after training, but fusion embeddings has it in the loss; give a number."
            )
        if self.docs is None and self.limit is None:
            object.__setattr__(self, "limit", DEMO_CHUNKS)
        if self.llm is not None and self.queries is not None:
            raise RefineFastError(
                "llm: --queries gives the queries already; leave out one of the two."
            )
        if self.out.exists() and not self.out.is_dir():
            raise RefineFastError(f"out: {self.out} is a file; name a folder.")
        if self.docs is not None and self.out.is_relative_to(self.docs):
            raise RefineFastError(
                f"out: {self.out} lies in the documents' folder, so the run would read its own files; name another one."
            )

    def llm_settings(self) -> LLMSettings | None:
        """What the model that writes the queries is asked, or None without one."""
        if self.llm is None:
            return None
        from .queries.llm import LLMSettings

        return LLMSettings(
            self.llm,
            self.llm_model,
            key_env=self.llm_key_env,
            prompt=self.prompt,
            mix=dict(self.llm_mix),
            per_chunk=self.queries_per_chunk,
            temperature=self.llm_temperature,
            max_reply_tokens=self.llm_reply_tokens,
            concurrency=self.llm_concurrency,
            timeout=self.llm_timeout,
            max_calls=self.max_calls,
            max_tokens=self.max_tokens,
            max_cost=self.max_cost,
            price_in=self.price_in,
            price_out=self.price_out,
            duplicates=self.duplicates,  # type: ignore[arg-type]
            round_trip=self.round_trip,
            judge=self.judge,
            judge_prompt=self.judge_prompt,
            seed=self.seed,
        )

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(
            {item.name: _plain(getattr(self, item.name)) for item in dataclasses.fields(self)},
            sort_keys=False,
        )


def load_config(path: Path | None, flags: Mapping[str, Any]) -> RunConfig:
    """The run that the YAML file at ``path`` describes, with ``flags`` over it. Without either a file or documents, a run folder that is
    there goes on as its own config.yaml says."""
    out = flags.get("out")
    if (
        path is None
        and "docs" not in flags
        and out is not None
        and (saved := Path(out).expanduser() / "config.yaml").is_file()
    ):
        path = saved
    config = {**({} if path is None else _read_yaml(path)), **flags}
    if config.get("out") is None:
        raise RefineFastError("out: no run folder given; add --out FOLDER.")
    return RunConfig(**config)


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise RefineFastError(
            f"config: {path} does not exist; give the path of a YAML file."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RefineFastError(
            f"config: {path} cannot be read as YAML ({' '.join(str(error).split())}); correct it."
        ) from None
    if not isinstance(values, dict):
        raise RefineFastError(f"config: {path} holds no keys; write lines such as 'skip: 5'.")
    known = [item.name for item in dataclasses.fields(RunConfig)]
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in values.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "see refine-fast run --help."
        raise RefineFastError(f"config: {path} has an unknown key {name!r}; {remedy}")
    for name in (
        "docs",
        "queries",
        "out",
        "prompt",
        "judge_prompt",
    ):  # relative to the file that says so, not to wherever one stands
        if values.get(name) is not None:
            values[name] = os.path.join(path.parent, os.path.expanduser(str(values[name])))
    model = os.path.join(path.parent, os.path.expanduser(str(values.get("model"))))
    if values.get("model") not in (None, DEFAULT_ENCODER) and os.path.isdir(model):  # else a name
        values["model"] = model
    if values.get("ood") not in (None, "none"):
        folders = values["ood"] if isinstance(values["ood"], list) else [values["ood"]]
        values["ood"] = [
            os.path.join(path.parent, os.path.expanduser(str(folder))) for folder in folders
        ]
    return values


def _plain(value: Any) -> Any:
    """The value in YAML's own types."""
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _shown(value: Any) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, list | tuple)
        else str(value)
        if str(value)
        else "''"
    )
