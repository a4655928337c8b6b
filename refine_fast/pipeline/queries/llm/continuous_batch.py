"""Text generation with continuous batching: a row that ends gives its place to the next prompt.

Keys and values of all rows are in one buffer per layer, which grows but is never concatenated. A
prompt is read on its own, without padding; what it shares with earlier prompts is read once. Every
row draws its tokens with a generator of its own, so that its text does not depend on the others,
up to the rounding of matrix products.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any

import torch
from transformers import Cache

MIN_SHARED = 24
"""A beginning that two prompts share is kept from this many tokens on."""

MAX_PREFIXES = 8
"""Beginnings that are kept: one for each language's prompt, say."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names of the kinds of layer whose state is keys and values alone."""

_GROWTH = 128  # tokens


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: of the ``top_k`` most probable ones, those that make up ``top_p``."""

    temperature: float = 0.0
    """0: the most probable token."""
    top_k: int = 50
    top_p: float = 1.0


@dataclass(frozen=True)
class Lines:
    """A reply of ``count`` lines, each of which begins with one of a few tokens.

    Small models begin with prose, or answer instead of asking, unless they are held to the form.
    """

    count: int
    starts: Sequence[int]
    """Token ids; a line begins with one that no earlier line began with, while there is one."""
    ends: frozenset[int]
    """Token ids that end a line, such as a question mark."""
    line_break: int
    """Token id that is written between two lines."""


@dataclass(eq=False)
class Row:
    """One prompt and its reply so far."""

    prompt: Sequence[int]
    """Token ids."""
    sampling: Sampling
    seed: int
    max_tokens: int
    lines: Lines | None = None
    """The form of the reply; None: any."""
    tokens: list[int] = field(default_factory=list)
    """The reply, without the token that ended it."""
    finish: str | None = None
    """"stop" or "length"; None while the reply is being written."""

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed).random

    @property
    def allowed(self) -> list[int] | None:
        """The only token ids that may follow; None: any may."""
        if self.lines is None:
            return None
        if self.tokens and self.tokens[-1] in self.lines.ends:
            return [self.lines.line_break]
        line_break = self.lines.line_break
        if not self.tokens or self.tokens[-1] == line_break:
            after = pairwise([line_break, *self.tokens])
            used = {start for end, start in after if end == line_break}
            return [id for id in self.lines.starts if id not in used] or list(self.lines.starts)
        return None

    def add(self, token: int, ends: set[int]) -> None:
        """Adds a token to the reply, or ends it.

        Args:
            token: the token that follows.
            ends: token ids that end a reply.
        """
        if token in ends:
            self.finish = "stop"
            return
        self.tokens.append(token)
        if self.lines is not None and token in self.lines.ends:
            written = sum(token in self.lines.ends for token in self.tokens)
            self.finish = "stop" if written >= self.lines.count else None
        if self.finish is None and len(self.tokens) >= self.max_tokens:
            self.finish = "length"

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the buffer: the last one of the reply is not."""
        return len(self.prompt) + len(self.tokens) - 1


def unsupported_layers(config: Any) -> str | None:
    """The first kind of layer of a model that keeps more than keys and values of every token, such
    as a convolution or a recurrence; None if there is none."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return next((kind for kind in kinds if kind not in (FULL, SLIDING)), None)


class ContinuousBatch:
    """Prompts in, replies out, token by token.

    Args:
        model: a decoder of transformers whose state is keys and values alone.
        ends: token ids that end a reply.
    """

    def __init__(self, model: Any, ends: set[int]) -> None:
        self._model = model
        self._ends = ends
        self._rows: list[Row] = []
        self._state = _KeysAndValues()
        self._prefixes: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._last_prompt: Sequence[int] = ()
        parameters = inspect.signature(model.forward).parameters
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        self._mixed = {FULL, SLIDING} <= kinds
        slides = not kinds or SLIDING in kinds
        self._window: int | None = getattr(config, "sliding_window", None) if slides else None
        """Tokens that a sliding layer sees; None if no layer slides."""
        self._state_name = "cache" if "cache" in parameters else "past_key_values"

    def __len__(self) -> int:
        return len(self._rows)

    @torch.inference_mode()
    def admit(self, row: Row) -> list[Row]:
        """Reads a prompt and draws the first token of its reply.

        Returns:
            [row] if that ended the reply, else [].
        """
        place = len(self._rows)
        known = self._restore_prefix(row.prompt, place)
        new = torch.tensor([list(row.prompt[known:])], device=self._model.device)
        count = new.shape[1]
        positions = torch.arange(known, known + count, device=new.device)
        mask = torch.arange(known + count, device=new.device) <= positions[:, None]
        self._state.write_at(slice(place, place + 1), positions[None], known + count)
        logits = self._forward(new, positions[None], mask[None, None])
        self._rows.append(row)
        self._extend([row], logits)
        return self._remove_finished()

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Writes one token of every reply.

        Returns:
            The rows whose replies ended.
        """
        rows = self._rows
        device = self._model.device
        tokens = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
        positions = torch.tensor([[row.length] for row in rows], device=device)
        longest = int(positions.max()) + 1
        mask = torch.arange(longest, device=device) <= positions
        self._state.write_at(slice(0, len(rows)), positions, longest)
        self._extend(rows, self._forward(tokens, positions, mask[:, None, None]))
        return self._remove_finished()

    def clear(self) -> list[Row]:
        """Removes and returns all rows."""
        rows, self._rows = self._rows, []
        return rows

    def _forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """(rows, vocabulary) float32: the logits that follow the last of each row's tokens."""
        output = self._model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=self._windowed(positions, mask),
            logits_to_keep=1,
            use_cache=True,
            **{self._state_name: self._state},
        )
        return output.logits[:, -1].float()

    def _windowed(
        self, positions: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask that each kind of layer takes: some see only the last tokens."""
        keys = mask.shape[-1]
        if self._window is None or keys <= self._window:
            return mask
        first = positions[:, None, :, None] - self._window
        near = mask & (torch.arange(keys, device=mask.device) > first)
        return {FULL: mask, SLIDING: near} if self._mixed else near

    def _extend(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        for row, token in zip(rows, draw_tokens(logits, rows), strict=True):
            row.add(token, self._ends)

    def _remove_finished(self) -> list[Row]:
        finished = [row for row in self._rows if row.finish]
        for row in finished:
            place = self._rows.index(row)
            last = self._rows.pop()
            if last is not row:
                self._rows[place] = last
                self._state.move(len(self._rows), place, last.length)
        return finished

    def _restore_prefix(self, prompt: Sequence[int], place: int) -> int:
        """Copies the longest known beginning of the prompt to a place; its number of tokens.

        A beginning is known once two prompts in a row have shared it.
        """
        most = len(prompt) - 1  # something must be read for the first logits
        best = max(
            (p for p in self._prefixes if len(p) <= most and tuple(prompt[: len(p)]) == p),
            key=len,
            default=(),
        )
        shared = min(_shared(prompt, self._last_prompt), most)
        self._last_prompt = prompt
        if shared >= len(best) + MIN_SHARED:
            best = tuple(prompt[:shared])
            if len(self._prefixes) >= MAX_PREFIXES:
                del self._prefixes[next(iter(self._prefixes))]
            positions = torch.arange(shared, device=self._model.device)
            self._state.write_at(slice(place, place + 1), positions[None], shared)
            tokens = torch.tensor([best], device=positions.device)
            mask = positions <= positions[:, None]
            self._forward(tokens, positions[None], mask[None, None])
            self._prefixes[best] = self._state.copy(place, shared)
        if best:
            self._state.restore(place, self._prefixes[best])
        return len(best)


def draw_tokens(logits: torch.Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each row.

    Args:
        logits: (rows, vocabulary) float32.
        rows: how each draws, and the generator that it draws with.
    """
    tokens = []
    widest = max(row.sampling.top_k if row.sampling.temperature else 1 for row in rows)
    top, top_ids = (part.cpu() for part in logits.topk(min(widest, logits.shape[1])))
    for i, row in enumerate(rows):
        scores, ids = top[i].double(), top_ids[i]
        if (allowed := row.allowed) is not None:
            ids = torch.tensor(allowed)
            scores, order = logits[i, ids.to(logits.device)].double().cpu().sort(descending=True)
            ids = ids[order]
        tokens.append(int(ids[_drawn(scores, row)]))
    return tokens


def _drawn(scores: torch.Tensor, row: Row) -> int:
    """Which of the scores, in descending order, is drawn."""
    how = row.sampling
    if not how.temperature or len(scores) == 1:
        return 0
    shares = (scores[: how.top_k] / how.temperature).softmax(0)
    reached = shares[shares.cumsum(0) - shares < how.top_p].cumsum(0)
    return int((reached < row.draw() * reached[-1]).sum())


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the beginning that two prompts share."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class _KeysAndValues(Cache):
    """Keys and values of every row; a row is as long as its positions say."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._places = slice(0)
        self._positions = torch.zeros(0)
        self._longest = 0

    def write_at(self, places: slice, positions: torch.Tensor, longest: int) -> None:
        """Says where the next keys and values go.

        Args:
            places: the rows of the buffer.
            positions: (rows, tokens) int64.
            longest: the length of the longest row, what is written included.
        """
        self._places, self._positions, self._longest = places, positions, longest

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new keys and values, (rows, heads, tokens, width), and returns all of them."""
        kept = self._kept[layer_idx] = (
            self._with_room(self._kept.get(layer_idx, (None, None))[0], key_states),
            self._with_room(self._kept.get(layer_idx, (None, None))[1], value_states),
        )
        rows = torch.arange(self._places.start, self._places.stop, device=key_states.device)
        for buffer, new in zip(kept, (key_states, value_states), strict=True):
            buffer[rows[:, None], :, self._positions] = new.transpose(1, 2)
        keys, values = (buffer[self._places, :, : self._longest] for buffer in kept)
        return keys, values

    def _with_room(self, buffer: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        _, heads, _, width = new.shape
        rows, tokens = self._places.stop, self._longest
        if buffer is not None:
            if rows <= buffer.shape[0] and tokens <= buffer.shape[2]:
                return buffer
            rows, tokens = max(rows, buffer.shape[0]), max(tokens, buffer.shape[2])
        tokens = -(-tokens // _GROWTH) * _GROWTH
        larger = new.new_zeros(rows, heads, tokens, width)
        if buffer is not None:
            larger[: buffer.shape[0], :, : buffer.shape[2]] = buffer
        return larger

    def move(self, source: int, place: int, length: int) -> None:
        """Copies a row's first ``length`` tokens to another place."""
        for buffers in self._kept.values():
            for buffer in buffers:
                buffer[place, :, :length] = buffer[source, :, :length]

    def copy(self, place: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first ``length`` tokens of a row, by layer."""
        return [
            (keys[place, :, :length].clone(), values[place, :, :length].clone())
            for keys, values in self._kept.values()
        ]

    def restore(self, place: int, copied: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Writes what ``copy`` returned to a row."""
        length = copied[0][0].shape[1]
        self._places, self._longest = slice(place, place + 1), length
        for (index, buffers), new in zip(list(self._kept.items()), copied, strict=True):
            grown = tuple(
                self._with_room(buffer, part[None])
                for buffer, part in zip(buffers, new, strict=True)
            )
            self._kept[index] = (grown[0], grown[1])
            for buffer, part in zip(grown, new, strict=True):
                buffer[place, :, :length] = part

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """The length of the longest row before the next tokens; masks are made without it."""
        return self._longest - self._positions.shape[-1]
