"""``refine-fast``: parses the command line and hands over. Each flag of a run is a field of pipeline.config.RunConfig."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._native import isa
from .errors import RefineFastError
from .pipeline.config import QUICK, RunConfig, load_config

if TYPE_CHECKING:
    from .pipeline.console import Console

LAST_STAGE = {
    "queries": "query",
    "mine": "mine",
    "train": "train",
    "report": "report",
    "run": "report",
}
"""Command -> the last stage that it does."""

OK, FAILED, BAD_INPUT, LOCKED, INTERRUPTED = 0, 1, 2, 3, 130

EXAMPLES = """examples:
  refine-fast run --out demo                                     Python's own documentation and MiniLM: see it work
  refine-fast run docs/ --model BAAI/bge-small-en-v1.5 --out run
  refine-fast run docs/ --out run --queries queries.jsonl --ood beir/scifact --band auto --weight auto
  refine-fast run --out run                                      go on with a run that was stopped
  refine-fast mine --out run --skip 3                            do it again from the negatives on
  refine-fast eval minilm run/model --data beir/scifact
  refine-fast fuse base/ tuned/ --out fused/ --weight 0.5

exit codes: 0 done, 1 failed, 2 bad input, 3 another process works in the run folder, 130 stopped with Ctrl-C"""


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torch keeps a primitive for every shape of product, and oneDNN its code: 1,024 of either. Texts have any length, and bf16 training on
    # a CPU grew by 50 MB a step; with 16 of both it stays level, in the same time. Read at the first product.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    options = parser().parse_args(arguments)
    try:
        return perform(options)
    except ModuleNotFoundError as error:  # of an extra
        package = (error.name or "").partition(".")[0]
        print(
            f"error: refine-fast {options.command} needs {package}; pip install 'refine-fast[pipeline,llm]'.",
            file=sys.stderr,
        )
        return BAD_INPUT


def perform(options: argparse.Namespace) -> int:
    from .pipeline.console import Console
    from .pipeline.engine import LockedError

    console = Console(quiet=options.quiet, json=options.json)
    try:
        isa()  # a bad REFINE_FAST_ISA ends the command here, not hours later
        with console.warnings():
            options.work(options, console)
    except LockedError as error:
        console.error(str(error))
        return LOCKED
    except RefineFastError as error:
        console.error(str(error))
        return BAD_INPUT
    except KeyboardInterrupt:
        console.error(f"stopped; {options.stopped}.")
        return INTERRUPTED
    except OSError as error:
        console.error(
            f"{error.filename or 'a file'}: {error.strerror or error}; the same command goes on once that is mended."
        )
        return FAILED
    return OK


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="refine-fast",
        description="Adapts an embedding model to your own documents (REFINE, arXiv 2410.12890).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, work: Any, help: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"example:\n  refine-fast {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
        sub.add_argument("--quiet", action="store_true", help="say nothing but warnings and errors")
        sub.set_defaults(work=work, command=name, stopped="run the same command to resume")
        return sub

    run_flags(
        command(
            "run",
            run,
            "everything: documents in, fused model and report out",
            "run docs/ --out run --ood beir/scifact",
        )
    )
    run_flags(
        command(
            "plan",
            plan,
            "what a run would do and cost; spends nothing",
            "plan docs/ --out run --memory 8GB",
        )
    )
    doctor_command = command(
        "doctor", doctor, "what works on this machine", "doctor --model BAAI/bge-small-en-v1.5"
    )
    doctor_command.add_argument(
        "--model", default="minilm", metavar="NAME", help="the encoder to try"
    )
    doctor_command.add_argument(
        "--llm",
        metavar="URL",
        help="an OpenAI-compatible endpoint to probe, with a few short calls",
    )
    doctor_command.add_argument("--llm-model", metavar="NAME,...", help="the models to ask there")
    doctor_command.add_argument(
        "--llm-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key",
    )
    help = "print the prompt that queries are asked for with, to change and pass as --prompt"
    prompt_command = command("prompt", prompt, help, "prompt > mine.jinja")
    prompt_command.add_argument(
        "name",
        nargs="?",
        choices=["queries", "judge"],
        default="queries",
        help="judge: that of --judge-prompt",
    )
    run_flags(
        command(
            "queries",
            run,
            "a run as far as its queries",
            "queries docs/ --out run --queries-per-chunk 8",
        )
    )
    run_flags(
        command("mine", run, "a run as far as its hard negatives", "mine --out run --band auto")
    )
    run_flags(
        command(
            "train", run, "a run as far as the fine-tuned encoder", "train --out run --epochs 2"
        )
    )
    run_flags(command("report", run, "a run with its report; the same as run", "report --out run"))
    index_command = command(
        "index",
        index,
        "a faiss index of a run's documents under its fused model, for serving",
        "index run/",
    )
    index_command.add_argument(
        "folder", type=Path, metavar="RUN", help="the folder of a finished run"
    )

    fuse_command = command(
        "fuse", fuse, "interpolate two checkpoints", "fuse base/ tuned/ --out fused/ --weight 0.35"
    )
    fuse_command.set_defaults(stopped="nothing of the output is left")
    fuse_command.add_argument(
        "base", metavar="BASE", help="a model folder, a name, or a .safetensors file"
    )
    fuse_command.add_argument(
        "tuned",
        type=Path,
        metavar="TUNED",
        help="the folder or file fine-tuned from it, or that of a LoRA adapter",
    )
    fuse_command.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FOLDER", help="where the fused model goes"
    )
    fuse_command.add_argument(
        "--weight", type=float, default=0.35, metavar="W", help="share of TUNED (default 0.35)"
    )
    fuse_command.add_argument(
        "--weights", action="append", default=[], metavar="GLOB=W", type=weight_of_glob,
        help="share of TUNED in the tensors whose name matches, such as '*.embeddings.*=0'; the first match wins; may be repeated",
    )  # fmt: skip
    fuse_command.add_argument(
        "--dtype",
        metavar="T",
        help="of the output's float tensors: F32, BF16, F16, F64, F8_E4M3 or F8_E5M2 (default: BASE's)",
    )
    fuse_command.add_argument(
        "--checksum", action="store_true", help="SHA-256 of every weight file, in the same pass"
    )
    fuse_command.add_argument("--overwrite", action="store_true", help="replace what is at --out")

    eval_command = command(
        "eval",
        evaluate,
        "score models on a BEIR folder",
        "eval minilm run/model --data beir/scifact --split test",
    )
    eval_command.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="folders or names; the gains are against the first",
    )
    eval_command.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="a retrieval set in BEIR layout"
    )
    eval_command.add_argument(
        "--split", default="test", metavar="NAME", help="which of its qrels (default test)"
    )
    eval_command.add_argument(
        "--precision",
        choices=["fp32", "bf16", "auto"],
        default="fp32",
        help="of the encoder; auto: bf16 where the hardware has it (default fp32)",
    )
    return top


def weight_of_glob(text: str) -> tuple[str, float]:
    glob, _, weight = text.rpartition("=")
    try:
        return glob, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no GLOB=W; give one such as '*.embeddings.*=0'"
        ) from None


def run_flags(command: argparse.ArgumentParser) -> None:
    """DOCS, and one flag for each field of RunConfig. Only what is given is set, so that a YAML file can say the rest."""
    command.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file of any options below, such as 'queries_per_chunk: 8'",
    )
    command.add_argument(
        "--quick",
        action="store_true",
        help="every stage on a little data, to see that the set-up works",
    )
    for field in dataclasses.fields(RunConfig):
        if field.name == "docs":
            left_out = "; left out: those of the run at --out if there is one, else Python's own documentation"
            command.add_argument(
                "docs",
                nargs="?",
                default=argparse.SUPPRESS,
                metavar="DOCS",
                help=field.metadata["help"] + left_out,
            )
            continue
        default = (
            ""
            if field.default in (None, ()) or field.name == "out"
            else f" (default {shown(field.default)})"
        )
        command.add_argument(
            f"--{field.name.replace('_', '-')}", action="append" if field.name == "ood" else "store", default=argparse.SUPPRESS,
            metavar=field.metadata["metavar"], help=(field.metadata["help"] + default).replace("%", "%%"),
        )  # fmt: skip


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(
            f"{item[0]}={item[1]:g}" if isinstance(item, tuple) else f"{item:g}" for item in value
        )
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def config_of(options: argparse.Namespace) -> RunConfig:
    names = {field.name for field in dataclasses.fields(RunConfig)}
    flags = {name: value for name, value in vars(options).items() if name in names}
    return load_config(options.config, {**(QUICK if options.quick else {}), **flags})


def run(options: argparse.Namespace, console: Console) -> None:
    from .pipeline.commands.summary import show_run
    from .pipeline.runner import run

    context = run(config_of(options), console=console, until=LAST_STAGE[options.command])
    show_run(context, options.command)


def plan(options: argparse.Namespace, console: Console) -> None:
    from .pipeline.commands.plan import show_plan

    show_plan(config_of(options), console)


def doctor(options: argparse.Namespace, console: Console) -> None:
    from .pipeline.commands.doctor import show_health

    llm = (options.llm, options.llm_model, options.llm_key_env) if options.llm else None
    show_health(options.model, llm, console)


def prompt(options: argparse.Namespace, console: Console) -> None:
    from .pipeline.queries.llm import default_prompt

    text = default_prompt(options.name)
    if options.json:
        console.result({options.name: text})
    else:
        print(text, end="")


def index(options: argparse.Namespace, console: Console) -> None:
    from .pipeline.commands.index import index

    index(options.folder, console)


def fuse(options: argparse.Namespace, console: Console) -> None:
    from .pipeline.commands.summary import show_fusion
    from .pipeline.encoder.load import encoder_folder

    base = (
        Path(options.base)
        if options.base.endswith(".safetensors")
        else encoder_folder(options.base)
    )
    how = {name: getattr(options, name) for name in ("weight", "dtype", "checksum", "overwrite")}
    show_fusion(base, options.tuned, options.out, console, weights=dict(options.weights), **how)


def evaluate(options: argparse.Namespace, console: Console) -> None:
    from .pipeline.commands.summary import show_evaluation

    show_evaluation(options.models, options.data, options.split, options.precision, console)
