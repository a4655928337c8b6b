"""What an operation of the suite consists of: its inputs, its contenders, its work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import RefineFastError

Shape = Mapping[str, int | float]
"""Sizes by name, such as B, N and D."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Work:
    """What an operation needs at least, whoever does it.

    Attributes:
        flops: floating-point operations of its matrix products.
        bytes: bytes that must be read and written once.
    """

    flops: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Contender:
    """One way to do an operation.

    Attributes:
        name: the ``provider`` of its rows.
        run: does it once; takes the operation's inputs and returns what ``Operation.result``
            understands.
        about: what is measured, in a sentence.
        needs: the package that must be installed, if any.
        command: the program that must be on the PATH, if any.
        devices: where it runs.
        slow: whether it is left out of ``--quick``.
        exact: whether its result equals the others'; False for one that answers another question.
        dtypes: where it runs; empty: everywhere.
    """

    name: str
    run: Callable[[Any], object]
    about: str
    needs: str = ""
    command: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")
    slow: bool = False
    exact: bool = True
    dtypes: tuple[str, ...] = ()

    def missing(self, device: str, dtype: str) -> str:
        """Why it cannot take part here, or an empty string."""
        if self.needs and find_spec(self.needs.replace("-", "_")) is None:
            return f"needs the package {self.needs}: pip install {self.needs}"
        if self.command and shutil.which(self.command) is None:
            return f"needs the command {self.command} on the PATH"
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {' and '.join(self.dtypes)} only"
        return ""


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation in one mode.

    Attributes:
        name: the ``op`` of its rows, and the command line's name for it.
        mode: which form of it.
        shape: the default of every size; ``--shape`` changes some.
        quick: the sizes of ``--quick`` that differ.
        tiny: the sizes of a warm-up and of the tests that differ.
        full: further shapes of ``--full``, as changes of ``shape``; they make the scaling plots.
        check: the sizes of the regression check that differ; None: it has no check. What waits for
            a disk has none: its CPU time is not its own.
        dtypes: the first is the default.
        contenders: ours is called refine_fast.
        peer: the contender that ratios are to.
        check_peer: that of the regression check; it should resemble ours in what it asks of the
            machine, so that both slow down together on a busy one.
        inputs: (shape, dtype, device) -> a context that gives a contender's inputs.
        work: (shape, dtype) -> the least work.
        result: what a contender returned -> tensors to compare with the others'.
        before: called with the inputs before each sample, uncounted.
        floor: a contender that is no peer but the least that the hardware needs.
        measures_memory: whether the peak memory of each contender is measured.
        by_default: whether it takes part where no mode is named.
        needs: the package that the operation itself needs.
        rounds: samples of each contender by default.
        own_process: whether contenders start processes, which an earlier call does not warm up.
        stages_of: what ours returned -> seconds by stage, where another process did the work.
        watched: inputs -> a context in which the profile sees the stages of code that is not ours.
        square: whether N follows B where only B is given.
    """

    name: str
    mode: str
    shape: Shape
    contenders: tuple[Contender, ...]
    peer: str
    inputs: Callable[[Shape, str, str], AbstractContextManager[Any]]
    work: Callable[[Shape, str], Work]
    result: Callable[[Any], Any] = lambda found: found
    quick: Shape = field(default_factory=dict)
    tiny: Shape = field(default_factory=dict)
    full: tuple[Shape, ...] = ()
    check: Shape | None = None
    check_peer: str = ""
    dtypes: tuple[str, ...] = ("fp32",)
    before: Callable[[Any], None] | None = None
    floor: str = ""
    measures_memory: bool = True
    by_default: bool = True
    needs: str = ""
    rounds: int = 5
    own_process: bool = False
    watched: Callable[[Any], AbstractContextManager[object]] | None = None
    stages_of: Callable[[Any], dict[str, float]] | None = None
    square: bool = False

    @property
    def title(self) -> str:
        """Operation and mode, for a reader."""
        return f"{self.name} ({self.mode})"

    def contender(self, name: str) -> Contender:
        """The contender of that name."""
        return next(one for one in self.contenders if one.name == name)

    def present(
        self, device: str, dtype: str, *, quick: bool = False
    ) -> tuple[list[Contender], dict[str, str]]:
        """The contenders that can take part, and why the others cannot, by name."""
        there, absent = [], {}
        for contender in self.contenders:
            why = contender.missing(device, dtype)
            if not why and quick and contender.slow:
                why = "takes too long for --quick"
            if why:
                absent[contender.name] = why
            else:
                there.append(contender)
        return there, absent


@contextmanager
def made_inputs(op: Operation, shape: Shape, dtype: str, device: str) -> Iterator[Any]:
    """``op.inputs`` of sizes that a user gave.

    Raises:
        RefineFastError: if they cannot be made, since memory or disk is too small.
    """
    with ExitStack() as stack:
        try:
            inputs = stack.enter_context(op.inputs(shape, dtype, device))
        except (MemoryError, OverflowError, RuntimeError, ValueError, OSError) as error:
            sizes = ",".join(f"{name}={value}" for name, value in shape.items())
            raise RefineFastError(
                f"--shape: the inputs of {op.title} with {sizes} cannot be made "
                f"({first_line(error)}); give smaller sizes."
            ) from None
        yield inputs


def first_line(error: Exception) -> str:
    """The name of an exception and the first line of its message, which in torch's is followed by
    a stack of C++ calls."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def parse_shape(text: str, allowed: Shape) -> dict[str, int | float]:
    """``B=8192,D=768`` as sizes; capitals do not matter.

    Args:
        text: NAME=VALUE pairs, separated by commas.
        allowed: the sizes that the operation has, with their defaults, whose types decide.

    Raises:
        RefineFastError: the text is malformed, names an unknown size, or a size is out of range.
    """
    found: dict[str, int | float] = {}
    for pair in text.split(","):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise RefineFastError(
                f"--shape must be NAME=VALUE,... such as B=512,D=384 (got {pair!r})."
            )
        name = next((known for known in allowed if known.lower() == name.lower()), name)
        if name not in allowed:
            raise RefineFastError(
                f"--shape: unknown size {name!r}; this operation has {', '.join(allowed)}."
            )
        whole = isinstance(allowed[name], int)
        try:
            number: int | float = int(value.replace("_", "")) if whole else float(value)
        except ValueError:
            number = -1
        smallest_is_zero = name == "skip"
        if not (number > 0 or (smallest_is_zero and number == 0)) or number == float("inf"):
            kind = "an integer" if whole else "a number"
            least = ">= 0" if smallest_is_zero else "> 0"
            raise RefineFastError(f"--shape: {name} must be {kind} {least} (got {value!r}).")
        if number >= 2**63:
            raise RefineFastError(f"--shape: {name} must be below 2**63 (got {value!r}).")
        found[name] = number
    return found
