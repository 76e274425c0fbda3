"""`python -m imae_jax.evaluate.inspector`: one HTML page to look inside an IMAE model on texts.

The page holds, for every token, the gate of every unit and the log-probability and most likely tokens in the
base, expert and anti-expert modes. What belongs to token x_i is computed at the position that predicts it,
i − 1, as the training loss reads it; nobody predicts the first token. The page needs no network.
"""

import base64
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imae_jax import runtime
from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    add_process_arguments,
    command,
    join_processes,
    lock_outputs,
    model_arguments,
)
from imae_jax.config import LlamaConfig
from imae_jax.errors import UserError, first_line
from imae_jax.files import write_text

from . import pages

if TYPE_CHECKING:
    import jax

    from imae_jax.language_model import LanguageModel
    from imae_jax.llama import Weights

MODE_NAMES = ("base", "expert", "anti-expert")
BASE, EXPERT = 0, 1
TOP = 5
WINDOW = 2048
TOKENS_PER_BATCH, LENGTH_BUCKET, POSITIONS_PER_PROJECTION = 2048, 64, 128
ROWS_SHOWN = 8
MOST_TOKENS = 20_000
GENERATOR = "imae_jax.evaluate.inspector"
INCOMPLETE = "\ufffd"
# The longest run of tokens that is tried as one text where a character is cut into several.
LONGEST_RUN = 8


@dataclasses.dataclass(frozen=True)
class Excerpt:
    """A text to look at.

    Attributes:
        title: its heading on the page.
        tokens: at least two.
        start: number of the prompt's tokens; None for a text that is no prompt with an answer.
        fact: one bool an answer token: is it in T_fact? None where that is not known.
    """

    title: str
    tokens: tuple[int, ...]
    start: int | None = None
    fact: tuple[bool, ...] | None = None

    def regions(self) -> dict[str, np.ndarray]:
        """Parts of the text that summaries are made of, bool [T]; the first token is in none."""
        place = np.arange(len(self.tokens))
        regions = {"all tokens": place > 0}
        if self.start is not None:
            regions |= {"prompt": (place > 0) & (place < self.start), "answer": place >= self.start}
        if self.fact is not None:
            fact = np.zeros(len(place), bool)
            fact[self.start :] = self.fact
            regions |= {"T_fact": fact, "answer outside T_fact": regions["answer"] & ~fact}
        return regions


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a model does on an excerpt of T tokens, in M modes (`MODE_NAMES`).

    Values at token i are those computed at position i − 1; at the first token they mean nothing.

    Attributes:
        gates: float32 [M, L, T].
        log_probs: float32 [M, T], of the token.
        top_tokens: int32 [M, T, K], the most likely tokens instead of it.
        top_log_probs: float32 [M, T, K], theirs.
        context: int32 [T], how many tokens before it the model saw.
    """

    gates: np.ndarray
    log_probs: np.ndarray
    top_tokens: np.ndarray
    top_log_probs: np.ndarray
    context: np.ndarray

    @classmethod
    def empty(cls, length: int, config: LlamaConfig) -> "Inspection":
        M, top = len(MODE_NAMES), (len(MODE_NAMES), length, min(TOP, config.vocab_size))
        return cls(
            np.zeros((M, config.num_layers, length), np.float32),
            np.zeros((M, length), np.float32),
            np.zeros(top, np.int32),
            np.zeros(top, np.float32),
            np.zeros(length, np.int32),
        )


@dataclasses.dataclass(frozen=True)
class _Window:
    """Tokens `start` to `end` of an excerpt, which give the values of tokens `first` to `end`."""

    excerpt: int
    start: int
    end: int
    first: int

    @property
    def length(self) -> int:
        return self.end - self.start


def check_window(window: int | None, config: LlamaConfig) -> int:
    """The window to use: by default 2048 tokens, or the model's context where that is less.

    Raises:
        UserError: `window` is over the model's context, or under 2.
    """
    # Not `context_length`: beyond this `dynamic` RoPE changes with each row's length, and so would windows.
    limit = config.max_position_embeddings
    if window is None:
        return min(WINDOW, limit)
    if not 2 <= window <= limit:
        raise UserError(f"--window {window}: give 2 to {limit}, the model's context")
    return window


def inspect(
    lm: "LanguageModel",
    excerpts: Sequence[Excerpt],
    *,
    window: int | None = None,
    progress: Callable[[Sequence], Iterable] = lambda batches: batches,
) -> list[Inspection]:
    """Runs all modes over excerpts as rows of one batch.

    An excerpt that is longer than the window is run in windows that overlap by half: every token has at
    least `window // 2` tokens before it in the window that its values come from.

    Args:
        lm: with units; stacked layer weights compile faster.
        excerpts: to look at.
        window: in tokens; see `check_window`.
        progress: wraps the list of batches to show how far it is.

    Raises:
        UserError: a model without units, an excerpt that is too short, or token ids that the model lacks.
    """
    import jax

    from imae_jax.decode.scoring import batch_size
    from imae_jax.decode.streams import not_finite_error
    from imae_jax.distributed import to_host
    from imae_jax.sharding import use_mesh

    if lm.model.anti_expert_config is None:
        raise UserError(
            f"model {lm.base.reference} has no anti-expert units: give an IMAE directory (OUT/imae of a "
            "training run) as --model"
        )
    window = check_window(window, lm.config)
    for excerpt in excerpts:
        if len(excerpt.tokens) < 2:
            raise UserError(f"{excerpt.title} has {len(excerpt.tokens)} tokens: at least 2 are needed")
        lm.config.check_token_ids(excerpt.tokens)
    weights, run_modes = lm.model.weights(), jax.jit(_run_modes, static_argnames="config")
    found = [Inspection.empty(len(excerpt.tokens), lm.config) for excerpt in excerpts]
    for batch in progress(_batches(excerpts, window)):
        with use_mesh(lm.mesh):
            size = batch_size(len(batch))
        longest = max(part.length for part in batch)
        tokens = np.zeros((size, -(-longest // LENGTH_BUCKET) * LENGTH_BUCKET), np.int32)
        lengths = np.zeros(size, np.int32)
        for row, part in enumerate(batch):
            tokens[row, : part.length] = excerpts[part.excerpt].tokens[part.start : part.end]
            lengths[row] = part.length
        with use_mesh(lm.mesh):
            values = map(to_host, run_modes(weights, tokens, lengths, config=lm.config))
        gates, log_probs, top_tokens, top_log_probs = values
        for row, part in enumerate(batch):
            target, first = found[part.excerpt], slice(part.first, part.end)
            predicting = slice(part.first - part.start - 1, part.length - 1)
            bad = np.isnan(log_probs[:, row, predicting]).any(axis=1)
            if bad.any():
                mode = MODE_NAMES[int(bad.argmax())]
                models, method = lm.prepare(mode, generating=False)
                text = excerpts[part.excerpt].tokens[part.start : part.end]
                raise not_finite_error(models, method, text, f"{mode}, {excerpts[part.excerpt].title}")
            target.gates[:, :, first] = gates[:, row, :, predicting]
            target.log_probs[:, first] = log_probs[:, row, predicting]
            target.top_tokens[:, first] = top_tokens[:, row, predicting]
            target.top_log_probs[:, first] = top_log_probs[:, row, predicting]
            target.context[first] = np.arange(part.first, part.end) - part.start
    return found


def _windows(excerpt: int, length: int, window: int) -> list[_Window]:
    windows, start, first = [], 0, 1
    while first < length:
        end = min(start + window, length)
        windows.append(_Window(excerpt, start, end, first))
        start, first = start + window - window // 2, end
    return windows


def _batches(excerpts: Sequence[Excerpt], window: int) -> list[list[_Window]]:
    """Windows of about equal length, as many at a time as `TOKENS_PER_BATCH` allows."""
    windows = [part for i, e in enumerate(excerpts) for part in _windows(i, len(e.tokens), window)]
    batches: list[list[_Window]] = []
    for part in sorted(windows, key=lambda part: part.length):
        padded = -(-part.length // LENGTH_BUCKET) * LENGTH_BUCKET
        if not batches or (len(batches[-1]) + 1) * padded > TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(part)
    return batches


def _run_modes(
    weights: "Weights", tokens: "jax.Array", lengths: "jax.Array", *, config: LlamaConfig
) -> "tuple[jax.Array, ...]":
    """Gates [M, B, L, T], log-probabilities [M, B, T] of the next token, and the top tokens and their
    log-probabilities [M, B, T, K], of tokens [B, T] padded on the right."""
    import jax
    import jax.numpy as jnp

    from imae_jax.anti_expert import MODES
    from imae_jax.llama import Interventions, Options, Taps, forward, project

    B, T = tokens.shape
    M = len(MODE_NAMES)
    output = forward(
        weights,
        config,
        jnp.tile(tokens, (M, 1)),
        attention_mask=jnp.tile(jnp.arange(T) < lengths[:, None], (M, 1)),
        interventions=Interventions(
            strength=jnp.repeat(jnp.asarray([MODES[name] for name in MODE_NAMES]), B)
        ),
        options=Options(Taps(gates=True)),
    )

    def of_position(x):
        hidden, target = x
        logits = project(weights, hidden)
        total = jax.nn.logsumexp(logits)
        top, top_tokens = jax.lax.top_k(logits, min(TOP, config.vocab_size))
        log_prob = jnp.where(jnp.isfinite(logits).all(), logits[target] - total, jnp.nan)
        return log_prob, top_tokens, top - total

    # Nothing of size M · B · T · V is ever built.
    targets = jnp.tile(jnp.roll(tokens, -1, axis=1), (M, 1))
    positions = (output.hidden_states.reshape(M * B * T, -1), targets.reshape(-1))
    values = jax.lax.map(of_position, positions, batch_size=POSITIONS_PER_PROJECTION)
    log_probs, top_tokens, top_log_probs = (x.reshape(M, B, T, *x.shape[1:]) for x in values)
    gates = jnp.moveaxis(output.gates.reshape(config.num_layers, M, B, T), 0, 2)
    return gates, log_probs, top_tokens, top_log_probs


def read_texts(path: Path) -> list[tuple[str, str, str | None]]:
    """Texts of a file as (title, prompt, answer).

    A file named `*.jsonl` holds one `{"prompt": …, "answer": …}` a line, where the answer may be left out;
    any other file is one text.

    Raises:
        UserError: names the file or line that is wrong.
    """
    try:
        # Line ends as they are: they are tokens, too.
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text {path} cannot be read: {first_line(error)}") from error
    if not text.strip():
        raise UserError(f"text {path} is empty: give one of at least 2 tokens")
    if path.suffix != ".jsonl":
        return [(path.name, text, None)]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(f"line {number}", *_prompt_and_answer(line, f"{path} line {number}")) for number, line in lines]


def _prompt_and_answer(line: str, place: str) -> tuple[str, str | None]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{place} is no JSON object with a text "prompt"')
    prompt, answer = values["prompt"], values.get("answer")
    if not prompt.strip() or (answer is not None and not (isinstance(answer, str) and answer.strip())):
        raise UserError(f"{place}: prompt or answer is empty or no text")
    try:
        (prompt + (answer or "")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{place} holds half a character (a lone surrogate): mend the line") from error
    return prompt, answer


def encode_texts(
    lm: "LanguageModel", texts: Sequence[tuple[str, str, str | None]], format: str
) -> list[Excerpt]:
    """Tokens of what `read_texts` returns.

    Args:
        lm: whose tokenizer is used.
        texts: to encode.
        format: `raw` takes prompt and answer as they are; `plain` and `chat` frame them as in training,
            the end of turn included.
    """
    from imae_jax.decode import encode
    from imae_jax.prompts import adds_special_tokens, answer_frame, render, resolve_format

    format = resolve_format(lm.tokenizer, format, allow_raw=True)
    lead, end = answer_frame(lm.tokenizer, format)
    excerpts = []
    for title, prompt, answer in texts:
        if answer is None:
            (tokens,) = lm.encode_prompts([prompt], format)
            excerpts.append(Excerpt(title, tuple(tokens)))
            continue
        framed = render(lm.tokenizer, prompt, format), f"{lead}{answer}{end}"
        try:
            (item,) = encode(
                lm.tokenizer, *([text] for text in framed), add_special_tokens=adds_special_tokens(format)
            )
        except UserError as error:
            raise UserError(f"{title}: {error}") from error
        excerpts.append(Excerpt(title, item.tokens, item.start))
    return excerpts


def rows_of_run(lm: "LanguageModel", run: Path, rows: Sequence[int] | None) -> tuple[list[Excerpt], str]:
    """Rows of a training run's data with their T_fact.

    Args:
        lm: a model with the run's base.
        run: output directory of `imae_jax.train`, finished.
        rows: numbers in the data source; default: the first held-out ones, or the first ones.

    Returns:
        The excerpts, and what T_fact is.

    Raises:
        UserError: the directory holds no such data, was trained on another base, or lacks a row.
    """
    from imae_jax.convert import imae_dir
    from imae_jax.convert.identity import note
    from imae_jax.train import data
    from imae_jax.train.config import ColumnsConfig, DataConfig
    from imae_jax.train.loop import FILTER_DIR, IMAE_DIR
    from imae_jax.train.token_filter import stored_examples

    if not imae_dir.is_imae_dir(run / IMAE_DIR):
        raise UserError(f"{run} holds no {IMAE_DIR}: give the output directory of a finished training run")
    imae = imae_dir.read_config(run / IMAE_DIR)
    recorded = imae["base"]["fingerprint"]
    if recorded != lm.base.fingerprint:
        raise UserError(
            f"{run} was trained on another base than that of --model{note(recorded)}: give a model of "
            "that run"
        )
    settings = imae["training"]["config"]
    gamma, two_sided = settings["filter"]["gamma"], settings.get("objective") == "pairs"
    held_out = set(imae["training"]["data"]["held_out_rows"])
    if (run / FILTER_DIR).exists():
        stored = stored_examples(run / FILTER_DIR, gamma, two_sided=two_sided)
        facts = f"T_fact with γ = {gamma:g}"
    else:
        columns = ColumnsConfig(**settings["data"]["columns"])
        config = DataConfig(**settings["data"] | {"columns": columns})
        tokenized = data.tokenize(data.load_rows(config), lm.tokenizer, config)
        stored, facts = tokenized.train + tokenized.held_out, "T_fact is every answer token"
        trained_on = imae["training"]["data"]
        if any(trained_on.get(name) != value for name, value in tokenized.statistics.items()):
            raise UserError(f"{config.path or config.source} is not what {run} was trained on: restore it")
    examples = {example.row: example for example in stored if not example.right}
    if rows is None:
        rows = sorted(held_out & examples.keys() or examples)[:ROWS_SHOWN]
    missing = [str(row) for row in rows if row not in examples]
    if missing:
        raise UserError(
            f"{run} has no row {', '.join(missing)}: give rows from {min(examples)} to {max(examples)} that "
            "training did not skip"
        )
    return [
        Excerpt(
            f"row {row}, {'held out' if row in held_out else 'trained on'}",
            examples[row].tokens,
            examples[row].start,
            examples[row].fact,
        )
        for row in rows
    ], facts


def token_texts(tokenizer: Any, runs: Iterable[Sequence[int]]) -> list[str]:
    """The text of each run of tokens where text stands before it; cut characters become U+FFFD."""
    # At the beginning of a text SentencePiece would drop a leading space.
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    skip = len(tokenizer.decode(before, **options))
    return [tokenizer.decode([*before, *run], **options)[skip:] for run in runs]


def cut_characters(tokenizer: Any, tokens: Sequence[int], texts: dict[int, str]) -> dict[int, str]:
    """Texts to show, by place, where a character is cut into several tokens: the first one gets it."""
    shown, place = {}, 0
    while place < len(tokens):
        step = 1
        if INCOMPLETE in texts[tokens[place]]:
            ends = range(place + 2, min(place + LONGEST_RUN, len(tokens)) + 1)
            wholes = zip(ends, token_texts(tokenizer, [tokens[place:end] for end in ends]), strict=True)
            found = next(((end, whole) for end, whole in wholes if INCOMPLETE not in whole), None)
            if found:
                shown |= {place: found[1]} | dict.fromkeys(range(place + 1, found[0]), "")
                step = found[0] - place
        place += step
    return shown


def byte_name(token: str) -> str:
    """A token that holds part of a character, by its bytes as SentencePiece names them: `<0xE6><0x9D>`."""
    # Byte-level BPE writes every byte as one character: itself if it can be printed, else one from 256 on.
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    byte_of = {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}
    if not all(character in byte_of for character in token) or token.startswith("<0x"):
        return token
    return "".join(f"<0x{byte_of[character]:02X}>" for character in token)


def summarize(excerpts: Sequence[Excerpt], inspections: Sequence[Inspection]) -> list[dict[str, Any]]:
    """Means over each region of all excerpts that have it.

    Returns:
        For each region: `region`, `tokens` (how many), and by mode `gates` [M], `log_probs` [M] and
        `layers` [M, L], the mean gate of every layer; `gain`, by how much the expert's log-probabilities
        exceed the base's.
    """
    gathered: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for excerpt, inspection in zip(excerpts, inspections, strict=True):
        for region, mask in excerpt.regions().items():
            values = inspection.gates[:, :, mask], inspection.log_probs[:, mask]
            gathered.setdefault(region, []).append(values)
    rows = []
    for region, parts in gathered.items():
        gates, log_probs = (np.concatenate(x, axis=-1).astype(np.float64) for x in zip(*parts, strict=True))
        if log_probs.shape[-1]:
            rows.append(
                {
                    "region": region,
                    "tokens": log_probs.shape[-1],
                    "gates": gates.mean(axis=(1, 2)).tolist(),
                    "log_probs": log_probs.mean(axis=1).tolist(),
                    "layers": gates.mean(axis=2).tolist(),
                    "gain": float((log_probs[EXPERT] - log_probs[BASE]).mean()),
                }
            )
    return rows


def render_page(
    tokenizer: Any,
    excerpts: Sequence[Excerpt],
    inspections: Sequence[Inspection],
    *,
    model: str,
    settings: dict[str, Any],
) -> str:
    """The page as HTML.

    Gates are stored in steps of 1/255, everything else in float32.

    Args:
        tokenizer: of the model.
        excerpts: what was looked at.
        inspections: of `inspect`.
        model: name for the heading.
        settings: what the page says about how it was made, as text by name.
    """
    ids = {int(i) for x in inspections for i in np.unique(x.top_tokens)}
    ids = sorted(ids.union(*(excerpt.tokens for excerpt in excerpts)))
    texts = dict(zip(ids, token_texts(tokenizer, [[i] for i in ids]), strict=True))
    shown = [cut_characters(tokenizer, excerpt.tokens, texts) for excerpt in excerpts]
    texts |= {
        i: byte_name(tokenizer.convert_ids_to_tokens(i)) for i, text in texts.items() if INCOMPLETE in text
    }
    summary = summarize(excerpts, inspections)
    data = {
        "modes": MODE_NAMES,
        "layers": inspections[0].gates.shape[1],
        "top": inspections[0].top_tokens.shape[-1],
        "texts": texts,
        "summary": summary,
        "excerpts": [
            {
                "title": excerpt.title,
                "length": len(excerpt.tokens),
                "start": excerpt.start,
                "facts": None
                if excerpt.fact is None
                else np.flatnonzero(excerpt.regions()["T_fact"]).tolist(),
                "shown": whole_texts,
                "tokens": _pack(np.array(excerpt.tokens), "<u4"),
                "gates": _pack(np.rint(255 * inspection.gates), "u1"),
                "logProbs": _pack(inspection.log_probs, "<f4"),
                "topTokens": _pack(inspection.top_tokens, "<u4"),
                "topLogProbs": _pack(inspection.top_log_probs, "<f4"),
                "context": _pack(inspection.context, "<u4"),
            }
            for excerpt, inspection, whole_texts in zip(excerpts, inspections, shown, strict=True)
        ],
    }
    return pages.render(
        "inspector",
        generator=GENERATOR,
        model=model,
        settings=settings,
        summary=summary,
        modes=MODE_NAMES,
        layers=data["layers"],
        data=data,
    )


def _pack(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array.astype(dtype)).tobytes()).decode()


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raises a `UserError` unless `path` can be written and holds nobody's other file."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: choose another --html")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another --html, or pass --overwrite")
    try:
        if path.exists() and GENERATOR.encode() not in path.read_bytes()[:1024]:
            raise UserError(f"{path} is not a page of this command: choose another --html")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: its directory is read-only")


def _row_numbers(text: str) -> list[int]:
    """`0,5,7` as numbers."""
    try:
        rows = [int(part) for part in text.split(",")]
    except ValueError:
        rows = [-1]
    if min(rows) < 0 or len(set(rows)) < len(rows):
        raise UserError(f"--rows {text}: give different row numbers such as 0,5,7")
    return rows


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.inspector",
        description="Writes an HTML page of an IMAE model's gates and predictions on every token of texts.",
    )
    add_model_arguments(parser)
    add_process_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help='a text, or FILE.jsonl of {"prompt": …, "answer": …}, the answer optional',
    )
    source.add_argument(
        "--data", type=Path, metavar="RUN", help="output directory of a training run: its rows, with T_fact"
    )
    parser.add_argument(
        "--rows", help=f"row numbers of --data, e.g. 0,5,7 (default: the first {ROWS_SHOWN} held-out ones)"
    )
    parser.add_argument(
        "--format",
        help="how lines of FILE.jsonl are put: raw as they are, plain (Q: …, A:) or chat (default: raw)",
    )
    parser.add_argument("--html", type=Path, required=True, metavar="FILE", help="page to write")
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help=f"tokens at a time of longer texts; windows overlap by half (default: {WINDOW}, or the model's "
        "context)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing page")
    args = parser.parse_args(argv)
    join_processes(args)
    if args.rows is not None and args.data is None:
        raise UserError("--rows goes with --data RUN")
    rows = None if args.rows is None else _row_numbers(args.rows)
    if args.format is not None and (args.text is None or args.text.suffix != ".jsonl"):
        raise UserError("--format goes with --text FILE.jsonl: other texts are taken as they are")
    texts = None if args.text is None else read_texts(args.text)
    lock_outputs(args.html)
    check_output(args.html, overwrite=args.overwrite)
    from tqdm import tqdm

    from imae_jax.convert import load_model

    lm = load_model(args.model, stacked=True, **model_arguments(args))
    window = check_window(args.window, lm.config)
    if texts is not None:
        excerpts = encode_texts(lm, texts, args.format or "raw")
        settings = {"text": args.text, "format": args.format or "raw"}
    else:
        excerpts, facts = rows_of_run(lm, args.data, rows)
        settings = {"data": f"{args.data}, {facts}"}
    count = sum(len(excerpt.tokens) for excerpt in excerpts)
    if count > MOST_TOKENS:
        raise UserError(f"{count} tokens are more than a page holds ({MOST_TOKENS}): give less text or rows")
    inspections = inspect(
        lm,
        excerpts,
        window=window,
        progress=lambda batches: tqdm(batches, desc="inspect", unit="batch", disable=args.quiet),
    )
    git = runtime.git_state()
    settings |= {
        "model": args.model,
        "base": lm.base.reference,
        "sizes": f"{lm.config.num_layers} layers of width {lm.config.hidden_size}, units of width "
        f"{lm.model.anti_expert_config.intermediate_size}, {lm.base.dtype}",
        "windows": f"of {window} tokens, overlapping by {window // 2}",
        "versions": ", ".join(f"{name} {version}" for name, version in runtime.versions().items()),
        "commit": git and git["commit"] + (" with changes" if git["dirty"] else ""),
    }
    shown = {name: value for name, value in settings.items() if value is not None}
    page = render_page(lm.tokenizer, excerpts, inspections, model=args.model, settings=shown)
    write_text(args.html, page)
    print(f"wrote {args.html}: {count} tokens, {len(page.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
