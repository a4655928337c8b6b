"""A whole run, or its first stages: each stage is redone only when it must be."""

from __future__ import annotations

from ..files import atomic
from .config import RunConfig
from .console import Console
from .context import RunContext
from .encoder.load import encoder_folder
from .encoder.prepare import prepare_encoder
from .engine import RunFolder
from .stages import run_stages


def run(config: RunConfig, *, console: Console | None = None, until: str = "report") -> RunContext:
    """Does the stages up to ``until`` that are not up to date.

    A run that was stopped, by Ctrl-C, an error or a kill, resumes when it is started again.

    Args:
        config: what to do; ``config.out`` is the run folder.
        console: where progress and warnings go; stderr by default.
        until: name of the last stage, such as "query", "mine" or "train".

    Returns:
        The context of the run: its ``model`` is the folder of the fused encoder, its ``report``
        the content of report.json.

    Raises:
        LockedError: if another process is using the run folder.
        RefineFastError: if the input cannot be used; the message says why and what to do.
    """
    console = Console() if console is None else console
    with RunFolder(config.out) as folder, console.warnings():
        options = config.encoder_options()
        encoder = prepare_encoder(encoder_folder(config.model), options, say=console.say)
        context = RunContext(config, encoder, console, options)
        with atomic(config.out / "config.yaml") as temporary:
            temporary.write_text(config.to_yaml(), encoding="utf-8")
        for stage in run_stages(context):
            reasons = folder.reasons(stage)
            if reasons:
                console.say(f"{stage.name}: {'; '.join(reasons)}")
                console.say(f"{stage.name}: done in {folder.do(stage):.1f} s")
            else:
                console.say(f"{stage.name}: up to date")
            if stage.name == until:
                break
    return context
