"""Context of a run, passed to every stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from ..errors import RefineFastError
from ..files import name_of, read_json
from ..integrations.sentence_transformers.twin import TwinEncoder
from .artifacts import FUSION_FACTS, MODEL
from .config import RunConfig
from .config_values import LLM_TEACHER
from .console import Console, DistantConsole
from .corpus.beir import is_beir
from .corpus.nanobeir import nanobeir_folder
from .encoder.load import DEFAULT_ENCODER, encoder_folder
from .encoder.options import EncoderOptions
from .engine import key_digest
from .queries.query import Made
from .workers import Hear, Part, Spread, Workers


@dataclass(frozen=True)
class RunContext:
    """Configuration, encoder folder and console of one run.

    Raises:
        RefineFastError: if the encoder is itself a fused pair of encoders.
    """

    config: RunConfig
    encoder: Path
    """Local folder of the base encoder."""
    console: Console
    encoder_options: EncoderOptions = field(default_factory=EncoderOptions)
    workers: Workers | None = None
    """The processes that share the work of a stage; None: this process does it."""

    def __post_init__(self) -> None:
        if (self.encoder / TwinEncoder.config_file_name).is_file():
            raise RefineFastError(
                f"model: {self.encoder} holds two encoders (fusion embeddings); "
                "adapt its subfolder tuned or frozen instead."
            )

    @property
    def out(self) -> Path:
        """The run folder."""
        return self.config.out

    def path(self, name: str) -> Path:
        """Path of a file in the run folder."""
        return self.out / name

    def spread(
        self, folder: Path, load: partial[Any] | None = None, name: Any = None
    ) -> Spread | None:
        """How a stage spreads its work; None: it does not.

        Args:
            folder: the stage's folder.
            load: loads its encoder, or what the stage needs of it, in another process; its
                arguments of type ``Path`` are folders of this machine.
            name: what ``load`` loads.
        """
        if self.workers is None:
            return None
        there = None if load is None else self.workers.share_loader(load)
        return Spread(self.workers, folder / "shards" / key_digest(folder), there, name)

    def train_by_workers(
        self,
        folder: Path,
        work: Callable[..., None],
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        *,
        most: int,
    ) -> bool:
        """Has workers of the run do a training, if it has any for that.

        Args:
            folder: the stage's folder; or one under it.
            work: what each worker does: called with a context, a folder and ``saved``, which it
                calls after each checkpoint. A function of a module, or a ``partial`` of one.
            inputs: what it reads in the run folder.
            outputs: what it leaves in ``folder``.
            most: how many workers can share a batch.

        Returns:
            Whether the training is done.
        """
        if self.workers is None:
            return False
        out: Any = Part(self.out, inputs)  # a folder when it gets there
        as_rank = partial(_as_rank, work, self.config, self.encoder_options, self.encoder, out)
        with self.console.progress("training") as progress:
            show = {"say": self.console.say, "warn": self.console.warn, "progress": progress}
            return self.workers.train(
                folder,
                key_digest(folder),
                as_rank,
                outputs,
                most=most,
                hear=lambda kind, *news: show[kind](*news),
            )

    @property
    def model(self) -> Path:
        """Folder of the fused encoder, the product of the run."""
        return self.path(MODEL)

    @property
    def report(self) -> dict[str, Any]:
        """The content of report.json.

        Raises:
            RefineFastError: if the run has not come to its report.
        """
        content = read_json(self.path("report.json"))
        if content is None:
            raise RefineFastError(f"{self.out} has no report yet; run the rest of its stages.")
        return dict(content)

    @property
    def kept_base(self) -> bool:
        """Whether the product is the base encoder, since no fusion weight was better."""
        return read_json(self.path(FUSION_FACTS))["refused"] is not None

    @property
    def bf16(self) -> bool | None:
        """Whether to encode and train in bf16; None: where the hardware has it."""
        return self.config.bf16

    @property
    def trust_remote_code(self) -> bool:
        """Whether Python code in the folders of encoder and teacher may run. Not a setting of any
        stage: it decides whether a model loads, not what it computes."""
        return self.encoder_options.trust_remote_code

    @property
    def judged_corpus(self) -> Path | None:
        """The documents' folder if it is a retrieval set with test queries of its own."""
        docs = self.config.docs
        return docs if docs is not None and is_beir(docs) else None

    @cached_property
    def ood(self) -> tuple[Path, ...]:
        """Folders of the sets that are checked for forgetting; those given by name are fetched."""
        return tuple(
            nanobeir_folder(given) if isinstance(given, str) else given
            for given in self.config.ood or ()
        )

    @cached_property
    def teacher(self) -> Path | None:
        """Folder of the cross-encoder that teaches, fetched if it is given by name; None: there is
        none."""
        if self.teacher_kind != "cross-encoder":
            return None
        return encoder_folder(str(self.config.teacher), "teacher")

    @property
    def teacher_kind(self) -> Literal["cross-encoder", "llm"] | None:
        """What the teacher is that the user named; None: none was named."""
        if self.config.teacher is None:
            return None
        return "llm" if self.config.teacher == LLM_TEACHER else "cross-encoder"

    @property
    def built_in(self) -> bool:
        """Whether the documents are Python's own, since none were given."""
        return self.config.docs is None

    @property
    def written_beforehand(self) -> bool:
        """Whether the training queries are those that a language model wrote for Python's
        documentation before it was packaged: the demo's, unless others are asked for."""
        config = self.config
        others = (config.queries, config.llm, config.query_kinds or None)
        return self.built_in and others == (None, None, None)

    @property
    def made(self) -> Made:
        """How many of the queries that are split into training and test are made from the documents
        without a language model."""
        config = self.config
        if config.queries is not None or self.written_beforehand or not config.made_kinds:
            return "none"
        return "some" if config.llm_writes else "all"

    @property
    def adds_made(self) -> bool:
        """Whether made queries are trained on beside the user's."""
        return self.config.queries is not None and bool(self.config.made_kinds)

    @property
    def has_test_queries(self) -> bool:
        """Whether the documents come with test queries; otherwise some of the training queries are
        held out. Python's documentation does."""
        return self.built_in or self.judged_corpus is not None

    @property
    def twin(self) -> bool:
        """Whether the frozen encoder is part of the loss and of the product."""
        return self.config.fusion == "embeddings"

    @property
    def chooses_distill(self) -> bool:
        """Whether the teachers' share of the loss is chosen on held-out queries."""
        return self.config.distill == "choose"

    @property
    def shares(self) -> tuple[float, ...]:
        """The teachers' shares of the loss that are trained with, in ascending order."""
        if not self.chooses_distill:
            return (self.distill,)
        return tuple(sorted({0.0, self.distill, 1.0}))

    @property
    def distill(self) -> float:
        """The teachers' share of the loss; where it is chosen, the one that is kept unless another
        is better.

        With thousands of people's questions a quarter gains as much as InfoNCE alone (SQuAD,
        travel); with COVID-QA's 576 it gains 2 points less at the same weight, and SciFact does not
        fall wholly below -1 point (benchmarks/recipe.py, "InfoNCE"). Made queries teach less, and
        need more of the teachers."""
        if not isinstance(self.config.distill, str):
            return self.config.distill
        if self.config.teacher is not None or self.adds_made:
            return 0.5
        return 0.25 if self.made == "none" else 0.5

    def similar_batches(self, distill: float) -> bool:
        """Whether queries with similar documents share batches, at a share of the teachers.

        It helps InfoNCE: after 41 steps on SQuAD with queries of a language model and no mined
        negatives, nDCG@10 of 600 questions that people asked changes by +1.8 points, with random
        batches by -0.5 (weight 1; at 0.5 by +2.0 and +1.1). With a mined negative, random batches
        gain as much in the domain (the demo's held-out queries: -0.4 points [-2.3, 1.6]) and forget
        more (-0.8 [-1.6, -0.0]). Under distillation nothing was measured."""
        if self.config.batches != "auto":
            return self.config.batches == "similar"
        return distill < 1

    @property
    def mined_negatives(self) -> int:
        """Hard negatives that are mined for each query: several for a teacher that was named, which
        teaches how they differ."""
        if self.config.negatives != "auto":
            return self.config.negatives
        return 1 if self.config.teacher is None else 4

    def trained_negatives(self, distill: float) -> int:
        """Hard negatives of each query that training sees at a share of the teachers.

        InfoNCE needs one: without, nDCG@10 of the demo's held-out queries changes by -1.3 points
        [-2.5, -0.1]. Without a named teacher, distillation alone does as well with none: on SQuAD's
        held-out queries nDCG@10 changes by 0.0 points [-1.1, 1.0], on general knowledge by -0.5
        [-1.5, 0.5], with one negative against none."""
        alone = distill == 1 and self.config.teacher is None
        return 0 if alone and self.config.negatives == "auto" else self.mined_negatives

    @property
    def chooses_weight(self) -> bool:
        """Whether the fusion weight is chosen on held-out queries."""
        return self.config.weight == "auto"

    @property
    def weights(self) -> list[float]:
        """The fusion weights of the curve, in ascending order, from 0."""
        given = [] if self.chooses_weight else [float(self.config.weight)]
        return sorted({0.0, *self.config.curve, *given})

    @property
    def compared_weights(self) -> list[float]:
        """The fusion weights at which the shares of the teachers are compared, from 0."""
        return self.weights if self.chooses_weight else sorted({0.0, float(self.config.weight)})

    @property
    def curve_weights(self) -> list[float]:
        """The fusion weights that have a stage of their own: with shares to choose from, those that
        are not part of the choice, and 0, which is the same for each share."""
        compared = self.compared_weights if self.chooses_distill else []
        return [weight for weight in self.weights if weight == 0 or weight not in compared]

    @property
    def base_name(self) -> str:
        """The base encoder as a reader of the report knows it."""
        if self.config.model == DEFAULT_ENCODER:
            return "sentence-transformers/all-MiniLM-L6-v2"
        return _short(self.config.model)

    @property
    def teacher_name(self) -> str | None:
        """The teacher that the user named, as a reader of the report knows it; None: none was
        named."""
        if self.teacher_kind == "llm":
            return self.llm_name
        return None if self.config.teacher is None else _short(self.config.teacher)

    @property
    def llm_name(self) -> str:
        """The language models as a reader of the report knows them."""
        return ", ".join(self.config.llm_model) or str(self.config.llm)

    @property
    def query_source(self) -> str:
        """Where the training queries come from, in words."""
        also = " and made from the documents" if self.adds_made or self.made == "some" else ""
        if self.config.queries is not None:
            return f"from {name_of(self.config.queries.name)}{also}"
        if self.config.llm is not None:
            return f"written by {self.llm_name}{also}"
        if self.written_beforehand:
            return "written by a large language model for this package"
        return "made from the documents without an LLM"


def _as_rank(
    work: Callable[..., None],
    config: RunConfig,
    options: EncoderOptions,
    encoder: Path,
    out: Path,
    folder: Path,
    hear: Hear,
    saved: Callable[[], None],
) -> None:
    """What a worker does in a training. ``out`` holds what it reads of the run folder."""
    console = DistantConsole(hear)
    with console.warnings():
        here = config.model_copy(update={"out": out})
        work(RunContext(here, encoder, console, options), folder, saved=saved)


def _short(model: str) -> str:
    """The name of a model, of which a folder's path is too long for a table."""
    folder = Path(model)
    return name_of(folder.name) if folder.is_absolute() else model
