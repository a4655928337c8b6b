"""``refine-fast``: parses the command line and hands over to the pipeline."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ._native import isa
from .arguments import (
    INDEX_FORMATS,
    MODEL_FORMATS,
    add_eval_flags,
    add_export_flags,
    add_llm_flags,
    add_prompt_flags,
    add_run_flags,
    add_trust_flag,
    count,
    join_negative_values,
    llm_options,
    passage_options,
    weight_of_glob,
)
from .bench.flags import add_bench_flags
from .errors import RefineFastError
from .termination import Terminated, terminable

if TYPE_CHECKING:
    from .pipeline.config import RunConfig
    from .pipeline.console import Console

LAST_STAGE = {
    "queries": "query",
    "mine": "mine",
    "train": "train",
    "report": "report",
    "run": "report",
}
"""Command -> the last stage that it does."""

OK, FAILED, BAD_INPUT, LOCKED, KEPT_BASE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 4, 130, 143

EXAMPLES = """examples:
  refine-fast run --out demo                      try it on Python's documentation
  refine-fast run docs/ --model BAAI/bge-small-en-v1.5 --out run
  refine-fast run docs/ --out run --queries queries.jsonl --ood beir/scifact
  refine-fast run --out run                       resume a run that was stopped
  refine-fast mine --out run --skip 3             redo mining with another setting
  refine-fast eval minilm run/model --data beir/scifact
  refine-fast fuse base/ tuned/ --out fused/ --weight 0.5

exit codes: 0 success, 1 failure, 2 bad input, 3 the run folder is in use,
4 no fine-tuned model was better, so the base model was kept, 130 Ctrl-C, 143 SIGTERM"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        arguments: the command line without the program's name; by default the process's own.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torch and oneDNN cache a primitive for every shape of product, 1,024 each. Texts have any
    # length, and bf16 training on a CPU grew by 50 MB a step; with 16 of each, memory stays level
    # and training is as fast. Read at the first product.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    given = join_negative_values(sys.argv[1:] if arguments is None else arguments)
    try:
        return perform(parser().parse_args(given))
    except KeyboardInterrupt:  # before ``perform`` can say more: its imports take seconds
        print("error: stopped.", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == __package__:
            raise
        print(
            f"error: refine-fast needs the package {package}; "
            "pip install 'refine-fast[pipeline,llm]'.",
            file=sys.stderr,
        )
        return BAD_INPUT


def perform(options: argparse.Namespace) -> int:
    """Runs the command that was parsed and returns its exit code; prints errors as one line."""
    from .pipeline.console import Console
    from .pipeline.engine import LockedError
    from .pipeline.ranks import RankLostError

    console = Console(quiet=options.quiet, json=options.json)
    try:
        isa()  # a bad REFINE_FAST_ISA ends the command here, not hours later
        with console.warnings(), terminable():
            code = options.work(options, console)
    except LockedError as error:
        console.error(str(error))
        return LOCKED
    except RankLostError as error:
        console.error(str(error))
        return FAILED
    except RefineFastError as error:
        console.error(str(error))
        return BAD_INPUT
    except ValueError as error:
        if not raised_by_an_operation(error):
            raise
        console.error(f"{str(error).rstrip('.')}; check the model, or use --precision fp32.")
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        console.error(f"stopped; {options.stopped}.")
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except OSError as error:
        where, reason = error.filename or "a file", error.strerror or error
        console.error(f"{where}: {reason}; fix this and run the same command again.")
        return FAILED
    return code or OK


def raised_by_an_operation(error: Exception) -> bool:
    """Whether a check in refine_fast.ops raised the error, such as for NaN in embeddings."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith(f"{__package__}.ops.")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="refine-fast",
        description="Adapts an embedding model to your own documents (REFINE, arXiv 2410.12890).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, work: Callable[..., int | None], help: str, example: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"example:\n  refine-fast {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
        sub.add_argument("--quiet", action="store_true", help="print only warnings and errors")
        sub.set_defaults(work=work, command=name, stopped="run the same command again")
        return sub

    for name, work, help, example in (
        (
            "run",
            run,
            "do everything: documents in, fused model and report out",
            "run docs/ --out run --ood beir/scifact",
        ),
        (
            "plan",
            plan,
            "show what a run would do and cost, and try the encoder and the language model",
            "plan docs/ --out run --memory 8GB",
        ),
        (
            "queries",
            run,
            "run up to query generation",
            "queries docs/ --out run --queries-per-chunk 8",
        ),
        ("mine", run, "run up to mining of hard negatives", "mine --out run --band auto"),
        ("train", run, "run up to the fine-tuned encoder", "train --out run --epochs 2"),
        ("report", run, "run up to the report; the same as run", "report --out run"),
    ):
        sub = command(name, work, help, example)
        add_run_flags(sub)
        if name in LAST_STAGE:
            sub.set_defaults(stopped="run the same command to resume")

    sub = command(
        "doctor",
        doctor,
        "check what works on this machine",
        "doctor --model BAAI/bge-small-en-v1.5",
    )
    sub.add_argument(
        "--model", default="minilm", metavar="NAME", help="the encoder to try (default minilm)"
    )
    add_llm_flags(sub, "an OpenAI-compatible endpoint to probe with a few short calls")
    add_trust_flag(sub)

    sub = command(
        "prompt",
        prompt,
        "print the default prompt for queries, to edit and pass as --prompt, or try one",
        "prompt > mine.jinja",
    )
    add_prompt_flags(sub)

    sub = command(
        "index",
        index,
        "build the index of a run's documents that search and serve read",
        "index run/",
    )
    sub.add_argument("folder", type=Path, metavar="RUN", help="the folder of a finished run")
    sub.add_argument(
        "--type",
        choices=["auto", "flat", "sq8", "hnsw", "ivfpq"],
        help="kind of faiss index; flat: none, every vector is scored; auto: by the number of "
        "vectors (default: as it was, auto at first)",
    )
    sub.add_argument(
        "--add",
        type=Path,
        metavar="DOCS",
        help="add documents to the index; one whose id is there already replaces that document; "
        "within the run's folder, or in one around it, only if no other file still has it",
    )
    sub.add_argument(
        "--remove",
        action="append",
        default=[],
        metavar="ID",
        help="remove a document from the index; repeatable",
    )

    sub = command(
        "search",
        search,
        "search a run's index: base, fused, BM25 and their blend side by side",
        'search run/ "how do I reset it" -k 5',
    )
    sub.set_defaults(stopped="nothing was changed")
    sub.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run with an index")
    sub.add_argument("query", metavar="QUERY", help="what to search for")
    sub.add_argument(
        "-k", type=count, default=10, metavar="N", help="passages per system (default 10)"
    )

    sub = command(
        "serve",
        serve,
        "serve a run's index as a web page and a JSON endpoint",
        "serve run/",
    )
    sub.set_defaults(stopped="the marks are saved")
    sub.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run with an index")
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; an address that other machines reach needs the token that is "
        "printed, or that REFINE_FAST_TOKEN holds (default 127.0.0.1)",
    )
    sub.add_argument(
        "--port", type=int, default=8765, metavar="N", help="0: a free port (default 8765)"
    )

    sub = command(
        "export",
        export,
        "write a run's mined training set for another trainer, or its index or model for another "
        "server",
        "export run/ --format flagembedding --out train.jsonl",
    )
    sub.set_defaults(stopped="nothing was left at --out")
    add_export_flags(sub)

    sub = command(
        "fuse", fuse, "interpolate two checkpoints", "fuse base/ tuned/ --out fused/ --weight 0.35"
    )
    sub.set_defaults(stopped="nothing was left at --out")
    sub.add_argument("base", metavar="BASE", help="a model folder, a name or a .safetensors file")
    sub.add_argument(
        "tuned",
        type=Path,
        metavar="TUNED",
        help="the folder or file that was fine-tuned from BASE, or the folder of a LoRA adapter",
    )
    sub.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FOLDER", help="where the result goes"
    )
    sub.add_argument(
        "--weight", type=float, default=0.35, metavar="W", help="share of TUNED (default 0.35)"
    )
    sub.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="GLOB=W",
        type=weight_of_glob,
        help="share of TUNED in tensors whose name matches, such as '*.embeddings.*=0'; "
        "the first match wins; repeatable",
    )
    sub.add_argument(
        "--dtype",
        metavar="T",
        help="type of the result's float tensors: F32, BF16, F16, F64, F8_E4M3 or F8_E5M2 "
        "(default: as in BASE)",
    )
    sub.add_argument(
        "--checksum", action="store_true", help="compute the SHA-256 of every weight file as well"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace what exists at --out")
    sub.add_argument(
        "--force",
        action="store_true",
        help="fuse although the tokenizer, the architecture or the modules differ; the result has "
        "BASE's files",
    )

    sub = command(
        "eval",
        evaluate,
        "score models on a BEIR folder",
        "eval minilm run/model --data beir/scifact --split test",
    )
    add_eval_flags(sub)

    sub = command(
        "bench",
        bench,
        "measure and profile the operations on this machine, beside their peers",
        "bench band_topk --shape B=3000,N=50000,D=1024,k=7 --profile",
    )
    sub.set_defaults(stopped="the rows of what was measured before are kept")
    add_bench_flags(sub)
    return top


def bench(options: argparse.Namespace, console: Console) -> int:
    """Measures or profiles the operations."""
    from .bench.command import bench

    return bench(options, console)


def config_of(options: argparse.Namespace) -> RunConfig:
    """The configuration that the flags and the YAML file describe."""
    from .pipeline.config import RunConfig
    from .pipeline.config_file import load_config
    from .pipeline.recipes import QUICK

    given = vars(options)
    flags = {name: given[name] for name in RunConfig.model_fields if name in given}
    return load_config(options.config, flags, QUICK if options.quick else {})


def run(options: argparse.Namespace, console: Console) -> int:
    """Does the stages of a run up to the command's last one."""
    from .pipeline.commands.summary import show_run
    from .pipeline.ranks import launched
    from .pipeline.runner import run

    ranks = launched()
    context = run(config_of(options), console=console, until=LAST_STAGE[options.command])
    if ranks is not None and ranks.rank > 0:
        return OK
    show_run(context, options.command)
    whole = LAST_STAGE[options.command] == "report"
    return KEPT_BASE if whole and context.kept_base else OK


def plan(options: argparse.Namespace, console: Console) -> None:
    """Shows what a run would do and cost."""
    from .pipeline.commands.plan import show_plan

    show_plan(config_of(options), console)


def doctor(options: argparse.Namespace, console: Console) -> None:
    """Checks what works on this machine."""
    from .pipeline.commands.doctor import show_health
    from .pipeline.config import RunConfig

    llm = None
    if options.llm:
        with TemporaryDirectory() as out:  # nothing is written there
            llm = RunConfig(out=Path(out), **llm_options(options)).llm_settings()
    show_health(options.model, llm, console, trust_remote_code=options.trust_remote_code)


def prompt(options: argparse.Namespace, console: Console) -> None:
    """Prints a default prompt, or tries one."""
    from .pipeline.queries.llm import default_prompt

    if options.tried is not None:
        from .pipeline.commands.try_prompt import try_prompt
        from .pipeline.config import RunConfig

        with TemporaryDirectory() as out:
            config = RunConfig(
                out=Path(out),
                docs=options.docs,
                prompt=options.tried,
                **passage_options(options),
                **{"llm": "smollm2", **llm_options(options)},
            )
            try_prompt(config, options.count, console)
        return
    text = default_prompt(options.name)
    if options.json:
        console.result({options.name: text})
    else:
        print(text, end="")


def index(options: argparse.Namespace, console: Console) -> None:
    """Builds the index of a finished run."""
    from .pipeline.commands.index import index

    index(options.folder, console, kind=options.type, add=options.add, remove=options.remove)


def search(options: argparse.Namespace, console: Console) -> None:
    """Searches the index of a run."""
    from .pipeline.commands.search import search

    search(options.folder, options.query, options.k, console)


def serve(options: argparse.Namespace, console: Console) -> None:
    """Serves the index of a run."""
    from .pipeline.commands.serve import serve

    serve(options.folder, options.host, options.port, console)


def export(options: argparse.Namespace, console: Console) -> None:
    """Writes the training set of a run, its index or its product."""
    smaller = options.vectors != "float32" or options.dims is not None
    if smaller and options.format != "vectors":
        raise RefineFastError(
            f"--dims and --vectors are for the format vectors (got {options.format}); "
            "leave them out."
        )
    where = (options.folder, options.format, options.out, console)
    if options.format in INDEX_FORMATS:
        from .pipeline.commands.export_index import export_index

        export_index(
            *where,
            overwrite=options.overwrite,
            numbers=options.vectors,
            dimensions=options.dims,
        )
    elif options.format in MODEL_FORMATS:
        from .pipeline.commands.export_model import export_model

        export_model(*where, overwrite=options.overwrite)
    else:
        from .pipeline.commands.export import export

        export(*where, overwrite=options.overwrite)


def fuse(options: argparse.Namespace, console: Console) -> None:
    """Interpolates two checkpoints."""
    from .pipeline.commands.summary import show_fusion
    from .pipeline.encoder.load import encoder_folder

    is_file = options.base.endswith(".safetensors")
    base = Path(options.base) if is_file else encoder_folder(options.base)
    names = ("weight", "dtype", "checksum", "overwrite", "force")
    how = {name: getattr(options, name) for name in names}
    show_fusion(base, options.tuned, options.out, console, weights=dict(options.weights), **how)


def evaluate(options: argparse.Namespace, console: Console) -> None:
    """Scores models on a retrieval set, alone or in the systems that are served."""
    from .pipeline.commands.summary import show_evaluation, show_systems

    (show_systems if options.systems else show_evaluation)(
        options.models,
        options.data,
        options.split,
        console,
        precision=options.precision,
        trust_remote_code=options.trust_remote_code,
    )
