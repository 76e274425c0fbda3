"""Rows of many requests as batches, on one thread that owns the device."""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from imae_jax.continuation import Continuation
from imae_jax.decode import Method, Sampler, score
from imae_jax.decode.loop import GenerationOptions, stream_tokens
from imae_jax.decode.streams import Models
from imae_jax.errors import UserError, first_line
from imae_jax.language_model import STREAMED_CHUNK_SIZE, LanguageModel, text_so_far, tokens_of

logger = logging.getLogger(__name__)

WINDOW = 0.005
"""Seconds that an idle server waits for a first request's neighbours."""

BATCHES = 2
"""That run at a time, a chunk of each in turn: two modes answer side by side."""


class QueueFullError(Exception):
    """More rows would wait than may."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a request's rows are continued.

    Attributes:
        models, method: of `LanguageModel.prepare`.
        sampler, seed: how a token is drawn; every row as if it were alone.
        max_tokens: upper bound per row.
        stop: strings that end a text and are not part of it.
        ends: tokens that end a text.
        logprobs: whether the method's log-probabilities of the drawn tokens are asked for.
    """

    models: Models
    method: Method
    sampler: Sampler
    seed: int
    max_tokens: int
    stop: tuple[str, ...]
    ends: frozenset[int]
    logprobs: bool


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a chunk adds to a row's text.

    Attributes:
        index: of the row in its request.
        text: new text.
        finish_reason: `stop` or `length` in a row's last piece, else None.
        tokens: all tokens of the row, in its last piece: those of the text, and the one that ended it.
        logprobs: of `tokens`, where asked for.
    """

    index: int
    text: str
    finish_reason: str | None = None
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclasses.dataclass(eq=False)
class Row:
    """One prompt of a request.

    Attributes:
        index: in the request.
        prompt: token ids.
        settings: of the request.
        send: takes the row's `Piece`s, or the exception that ended it, on the batcher's thread.
        tokens: drawn so far.
        sent: number of characters sent.
        closed: whether nothing more comes: it has ended, or its client has gone.
    """

    index: int
    prompt: list[int]
    settings: Settings
    send: Callable[[Piece | Exception], None]
    tokens: list[int] = dataclasses.field(default_factory=list)
    sent: int = 0
    closed: bool = False

    @property
    def room(self) -> int:
        """New tokens that its batch is compiled for: a power of two where the context has it."""
        settings = self.settings
        rounded = 1 << (settings.max_tokens - 1).bit_length()
        return max(settings.max_tokens, min(rounded, settings.models.context_length - len(self.prompt)))

    @property
    def kind(self) -> tuple[Method, Sampler, int]:
        """Rows of one kind can share a batch."""
        return self.settings.method, self.settings.sampler, self.room


class Batcher:
    """Decodes rows: those of one kind that wait together as one batch, which nobody joins later.

    Args:
        lm: the model.
        batch_size: the most rows of a batch.
        queue_size: the most rows that wait.
    """

    def __init__(self, lm: LanguageModel, *, batch_size: int, queue_size: int):
        self.lm, self.batch_size, self.queue_size = lm, batch_size, queue_size
        self._waiting: list[Row] = []
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Puts rows into the queue, all or none.

        Raises:
            QueueFullError: there is no place for them.
        """
        with self._changed:
            if len(self._waiting) + len(rows) > self.queue_size:
                raise QueueFullError
            self._waiting += rows
            self._changed.notify()

    def leave(self, rows: Sequence[Row]) -> None:
        """Nobody waits for these rows any more."""
        with self._changed:
            for row in rows:
                row.closed = True
            self._waiting = [row for row in self._waiting if not row.closed]

    def end(self) -> None:
        """Returns when all rows are done."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        running: dict[tuple, Iterator[None]] = {}
        while True:
            with self._changed:
                self._changed.wait_for(lambda: running or self._waiting or self._ending)
                if not (running or self._waiting):
                    return
            if not running:
                time.sleep(WINDOW)
            while len(running) < BATCHES and (batch := self._next_batch(running)):
                running[batch[0].kind] = self._run(batch)
            for kind, run in [*running.items()]:
                try:
                    next(run)
                except StopIteration:
                    del running[kind]

    def _next_batch(self, running: dict[tuple, Iterator[None]]) -> list[Row]:
        """The rows that have waited longest of those of one kind, which is not running."""
        with self._changed:
            kind = next((row.kind for row in self._waiting if row.kind not in running), None)
            batch = [row for row in self._waiting if row.kind == kind][: self.batch_size]
            self._waiting = [row for row in self._waiting if row not in batch]
        return batch

    def _run(self, batch: list[Row]) -> Iterator[None]:
        """Decodes a batch, one chunk a step; what fails with others is tried alone."""
        try:
            yield from self._decode(batch)
        except Exception as error:
            rows = [row for row in batch if not row.closed]
            if len(batch) == 1:
                for row in rows:
                    traceback = None if isinstance(error, UserError) else error
                    logger.error("a request failed: %s", first_line(error), exc_info=traceback)
                    row.closed = True
                    row.send(error)
                return
            logger.warning("%d rows failed together (%s): each runs alone", len(rows), first_line(error))
            for row in rows:
                row.tokens.clear()
                yield from self._run([row])

    def _decode(self, batch: list[Row]) -> Iterator[None]:
        # Few numbers of rows are compiled; nobody reads the copies.
        size = min(1 << (len(batch) - 1).bit_length(), self.batch_size)
        rows = [*batch, *[batch[0]] * (size - len(batch))]
        closed, first = [row.closed for row in batch] + [True] * (size - len(batch)), batch[0]
        options = GenerationOptions(
            first.settings.sampler, first.room, tuple(row.settings.seed for row in rows), STREAMED_CHUNK_SIZE
        )
        for new in stream_tokens(
            first.settings.models,
            [row.prompt for row in rows],
            first.settings.method,
            options,
            eos_token_ids=self.lm.eos_token_ids,
            closed=closed,
        ):
            for row, tokens in zip(batch, new, strict=False):
                if tokens and not row.closed:
                    self._advance(row, tokens)
            closed[: len(batch)] = [row.closed for row in batch]
            yield

    def _advance(self, row: Row, new: list[int]) -> None:
        """Takes new tokens into a row, up to its end, and sends what they add."""
        settings, tokenizer = row.settings, self.lm.tokenizer
        new = new[: settings.max_tokens - len(row.tokens)]
        end = next((i + 1 for i, token in enumerate(new) if token in settings.ends), None)
        row.tokens += new[:end]
        last = end is not None or len(row.tokens) == settings.max_tokens
        text, stopped = text_so_far(tokenizer, row.prompt, row.tokens, settings.stop, finished=last)
        piece = Piece(row.index, text[row.sent :])
        row.sent = max(row.sent, len(text))
        if last or stopped:
            tokens = tokens_of(tokenizer, row.prompt, row.tokens, text) if stopped else tuple(row.tokens)
            piece = dataclasses.replace(
                piece,
                finish_reason="length" if end is None and not stopped else "stop",
                tokens=tokens,
                logprobs=self._logprobs(row, tokens),
            )
            row.closed = True
        if piece.text or piece.finish_reason:
            row.send(piece)

    def _logprobs(self, row: Row, tokens: tuple[int, ...]) -> tuple[float, ...]:
        if not (row.settings.logprobs and tokens):
            return ()
        group = [Continuation((*row.prompt, *tokens), len(row.prompt))]
        models, method = row.settings.models, row.settings.method
        ((_, scored),) = score(models, self.lm.config, [group], method)
        return tuple(scored.scores[0].tolist())
