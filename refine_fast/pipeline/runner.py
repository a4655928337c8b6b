"""A run: every stage in order, each redone only if something that it depends on changed."""

from __future__ import annotations

import warnings
from contextlib import suppress

from ..errors import RefineFastError
from ..files import atomic
from .artifacts import REPLIES
from .cluster.ray_workers import open_workers
from .config import RunConfig
from .config_file import refuse_others, saved_config
from .console import Console
from .context import RunContext
from .corpus.beir import load_beir
from .encoder.load import encoder_folder
from .encoder.prepare import prepare_encoder
from .engine import RunFolder
from .preflight import try_encoder, try_language_model, try_teacher
from .ranks import Ranks, launched
from .stages import run_stages
from .training.trained import Trained


def run(config: RunConfig, *, console: Console | None = None, until: str = "report") -> RunContext:
    """Does every stage up to ``until`` that is not up to date.

    A run that was stopped by Ctrl-C, an error or a kill resumes when it is started again.

    Of several processes that torchrun started, rank 0 does so, and the others take part in
    training.

    Args:
        config: what to do; ``config.out`` is the run folder.
        console: where messages go; stderr by default.
        until: name of the last stage, such as "query", "mine" or "train".

    Returns:
        The context of the run: ``model`` is the folder of the fused encoder, ``report`` the content
        of report.json.

    Raises:
        LockedError: if another process is using the run folder.
        RefineFastError: if the input cannot be used; the message names the remedy.
        ValueError: if the run has no stage ``until``.
    """
    console = Console() if console is None else console
    ranks = launched()
    if ranks is not None and config.distill == "choose":
        raise RefineFastError(
            "distill: choose trains several times, which torchrun's processes do not share; give a "
            "number, or start refine-fast without torchrun."
        )
    if ranks is not None and ranks.rank > 0:
        return _take_part(config, ranks)
    with (
        RunFolder(config.out) as folder,
        console.warnings(),
        open_workers(
            config.engine, console.say, config.shards, folder.work, config.train_workers
        ) as workers,
    ):
        options = config.encoder_options()
        encoder = prepare_encoder(encoder_folder(config.model), options, say=console.say)
        context = RunContext(config, encoder, console, options, workers)
        stages = list(run_stages(context))
        if until not in (names := [stage.name for stage in stages]):
            raise ValueError(f"until must be one of {', '.join(names)} (got {until!r})")
        refuse_others(folder, stages)
        _say_what_is_left(config, folder, console)
        with atomic(config.out / "config.yaml") as temporary:
            temporary.write_text(config.to_yaml(), encoding="utf-8")
        tried = False
        for stage in stages:
            reasons = folder.reasons(stage)
            if reasons and not tried:
                asks = stage.name in ("chunk", "query")
                teaches = not stage.name.startswith("train")
                _try_out(context, asks=asks and config.llm_writes, teaches=teaches)
            tried |= bool(reasons) or stage.name.startswith("train")
            if reasons:
                console.say(f"{stage.name}: {'; '.join(reasons)}")
                console.say(f"{stage.name}: done in {folder.do(stage):.1f} s")
                if workers is not None:
                    workers.discard(folder.work / stage.name)
            else:
                console.say(f"{stage.name}: up to date")
            if stage.name == until:
                break
        if until == names[-1]:
            if workers is not None:
                for name in {*names, *folder.stopped()}:
                    workers.discard(folder.work / name)
            folder.keep_only(stages)
    if ranks is not None:
        ranks.dismiss()
    return context


def _say_what_is_left(config: RunConfig, folder: RunFolder, console: Console) -> None:
    """Names the store of an earlier start that was stopped, if this one does not use it: nothing
    else will delete what is there."""
    with suppress(RefineFastError):  # what cannot be used is replaced
        before = saved_config(config.out).shards
        if before not in (None, config.shards) and folder.stopped():
            console.say(f"{before} may hold files of an earlier start of this run; delete them")


def _take_part(config: RunConfig, ranks: Ranks) -> RunContext:
    """What a rank other than 0 does: its part of the training, if rank 0 reaches it."""
    folder = ranks.wait_for_training()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rank 0 shows them
        options = config.encoder_options()
        encoder = prepare_encoder(encoder_folder(config.model), options)
        context = RunContext(config, encoder, Console(quiet=True), options)
        if folder is not None:
            next(stage for stage in run_stages(context) if stage.name == "train").work(folder)
    return context


def _try_out(context: RunContext, *, asks: bool, teaches: bool) -> None:
    """Raises RefineFastError for what cannot work, before the first stage starts."""
    config = context.config
    for folder in (*context.ood, *filter(None, [context.judged_corpus])):
        load_beir(folder)
    try_encoder(
        context.encoder,
        trust_remote_code=context.trust_remote_code,
        trained=Trained(config.lora, config.train_layers),
    )
    if teaches and context.teacher is not None:
        try_teacher(context.teacher, trust_remote_code=context.trust_remote_code)
    settings = config.llm_settings()
    if asks and settings is not None:
        try_language_model(settings, context.path(REPLIES))
    if teaches and context.teacher_kind == "llm" and settings is not None:
        try_language_model(settings, context.path(REPLIES), grades=True)
