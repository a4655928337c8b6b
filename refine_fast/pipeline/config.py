"""What a run is asked to do: one model, from which the flags, the YAML file, its JSON schema and
the messages about bad values all follow."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pydantic import (
    ConfigDict,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from .config_checks import check_together
from .config_messages import option_error
from .config_options import Options
from .config_values import NO_KINDS
from .encoder.options import EncoderOptions
from .queries.query import KINDS_IN_TURN
from .recipes import DEMO, RECIPES

if TYPE_CHECKING:
    from .queries.llm import LLMSettings

GIVEN = "given"
"""Key of the YAML file of a run, which names every value: those that were asked for."""

LOCAL_ROUND_TRIP = 10
"""The rank within which a query of a model in this process must find its chunk."""


class RunConfig(Options):
    """Everything that decides a run's result.

    Each field is a flag (``queries_per_chunk`` is ``--queries-per-chunk``) and a key of the YAML
    file, and takes the form of either: ``RunConfig(docs="docs/", out="run", band="0.3,0.5")``.

    Raises:
        RefineFastError: if a value cannot be used; the message names the field, the value and the
            remedy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise option_error(error, RunConfig) from None
        self.model_fields_set.intersection_update(values)  # without what _fill_in added

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # llm_extra is a dictionary, which has no hash

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        demo = dict(DEMO) if values.get("docs") is None else {}
        if "epochs" in values:
            demo.pop("max_steps", None)  # a number of epochs is asked for
        if values.get("fusion") == "embeddings":
            values = {"weight": RECIPES["paper"]["weight"], **values}  # it is part of the loss
        return {**demo, **RECIPES.get(str(values.get("recipe")), {}), **values}

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_numbers(cls, value: Any) -> Any:
        """``skip: yes`` in YAML is not 1."""
        return str(value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_together(self) -> RunConfig:
        # Without the packages of the extra llm they are not checked: a command that only reads a
        # run's folder needs none, and any other imports them before it starts.
        with suppress(ModuleNotFoundError):
            self.llm_settings()
        check_together(self)
        return self

    @field_serializer("llm_mix")
    def _mix_as_mapping(self, mix: Any) -> dict[str, float]:
        return dict(mix)

    def encoder_options(self) -> EncoderOptions:
        """The options of the base encoder."""
        return EncoderOptions(
            query_prompt=self.query_prompt,
            document_prompt=self.document_prompt,
            similarity=self.similarity,
            dimensions=self.dimensions,
            trust_remote_code=self.trust_remote_code,
        )

    @property
    def bf16(self) -> bool | None:
        """``precision``: whether to use bf16; None: where the hardware has it."""
        return {"auto": None, "bf16": True, "fp32": False}[self.precision]

    @property
    def written_per_chunk(self) -> int:
        """How many queries a language model is asked to write for each chunk."""
        return 2 if self.queries_per_chunk == "auto" else self.queries_per_chunk

    @property
    def made_per_chunk(self) -> int:
        """How many queries are made for each chunk without one."""
        return 3 if self.queries_per_chunk == "auto" else self.queries_per_chunk

    @property
    def made_kinds(self) -> tuple[str, ...]:
        """``query_kinds``, decided. The bundled model is too small for its queries alone: on SQuAD
        they gain 1.1 points of recall@3 [0.1, 2.1], those of these kinds 3.5 [2.1, 4.8], and both
        2.8 [1.6, 4.0] (benchmarks/recipe.py)."""
        if self.query_kinds == NO_KINDS:
            return ()
        if self.query_kinds:
            return self.query_kinds
        if self.queries is not None:
            return ()
        if self.llm is None:
            return KINDS_IN_TURN
        from .queries.llm import SMOLLM2

        return KINDS_IN_TURN if self.llm == SMOLLM2 else ()

    @property
    def llm_writes(self) -> bool:
        """Whether the language model writes the queries; otherwise it may teach."""
        return self.llm is not None and self.queries is None

    def llm_settings(self) -> LLMSettings | None:
        """What the language model is asked; None without one."""
        if self.llm is None:
            return None
        from .queries.llm import IN_PROCESS, SMOLLM2, SMOLLM2_MODEL, LLMSettings

        round_trip = self.round_trip
        if round_trip == "auto":
            round_trip = LOCAL_ROUND_TRIP if self.llm in (SMOLLM2, IN_PROCESS) else 0
        bundled = self.llm == SMOLLM2 and not self.llm_model
        return LLMSettings(
            self.llm,
            (SMOLLM2_MODEL,) if bundled else self.llm_model,
            key_env=self.llm_key_env,
            prompt=self.prompt,
            mix=dict(self.llm_mix),
            per_chunk=self.written_per_chunk,
            temperature=self.llm_temperature,
            max_reply_tokens=self.llm_reply_tokens,
            extra=self.llm_extra,
            batch=self.llm_batch,
            concurrency=self.llm_concurrency,
            timeout=self.llm_timeout,
            max_calls=self.max_calls,
            max_tokens=self.max_tokens,
            max_cost=self.max_cost,
            price_in=self.price_in,
            price_out=self.price_out,
            duplicates=self.duplicates,
            round_trip=round_trip,
            judge=self.judge,
            judge_prompt=self.judge_prompt,
            seed=self.seed,
        )

    def to_yaml(self) -> str:
        """The configuration as YAML, which ``load_config`` reads back. What was not given gives way
        where another recipe fills it in."""
        import yaml

        given = [name for name in RunConfig.model_fields if name in self.model_fields_set]
        return yaml.safe_dump({**self.model_dump(mode="json"), GIVEN: given}, sort_keys=False)
