"""Texts to inspect: of a file, or rows of a training run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imae_jax.convert import imae_dir
from imae_jax.convert.identity import note
from imae_jax.decode import encode
from imae_jax.errors import UserError, first_line
from imae_jax.evaluate.inspector.compute import Excerpt
from imae_jax.files import read_rows
from imae_jax.language_model import LanguageModel
from imae_jax.prompts import adds_special_tokens, answer_frame, render, resolve_format
from imae_jax.train import data
from imae_jax.train.config import ColumnsConfig, DataConfig
from imae_jax.train.run_directory import FILTER_DIR, IMAE_DIR
from imae_jax.train.token_filter import stored_examples

DEFAULT_ROWS = 8


def read_texts(path: Path) -> list[tuple[str, str, str | None]]:
    """Texts of a file as (title, prompt, answer).

    A file named `*.jsonl` holds one `{"prompt": …, "answer": …}` a line, where the answer may be left out;
    any other file is one text.

    Raises:
        UserError: names the file or line that is wrong.
    """
    if path.suffix == ".jsonl":
        texts = [
            (location.removeprefix(f"{path} "), *_prompt_and_answer(values, location))
            for location, values in read_rows(path, "text")
        ]
    else:
        try:
            # Line ends as they are: they are tokens, too.
            text = path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"text {path} cannot be read: {first_line(error)}") from error
        texts = [(path.name, text, None)] if text.strip() else []
    if not texts:
        raise UserError(f"text {path} is empty: give one of at least 2 tokens")
    return texts


def _prompt_and_answer(values: Any, location: str) -> tuple[str, str | None]:
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{location} is no JSON object with a text "prompt"')
    prompt, answer = values["prompt"], values.get("answer")
    if not prompt.strip() or (answer is not None and not (isinstance(answer, str) and answer.strip())):
        raise UserError(f"{location}: prompt or answer is empty or no text")
    try:
        (prompt + (answer or "")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{location} holds half a character (a lone surrogate): correct the line") from error
    return prompt, answer


def encode_texts(
    lm: LanguageModel, texts: Sequence[tuple[str, str, str | None]], format: str
) -> list[Excerpt]:
    """Tokens of what `read_texts` returns.

    Args:
        lm: model whose tokenizer is used.
        texts: titles, prompts and answers.
        format: `raw` takes prompt and answer as they are; `plain` and `chat` frame them as in training,
            the end of turn included.
    """
    format = resolve_format(lm.tokenizer, format, allow_raw=True)
    lead, end = answer_frame(lm.tokenizer, format)
    excerpts = []
    for title, prompt, answer in texts:
        if answer is None:
            (tokens,) = lm.encode_prompts([prompt], format)
            excerpts.append(Excerpt(title, tuple(tokens)))
            continue
        prompt, answer = render(lm.tokenizer, prompt, format), f"{lead}{answer}{end}"
        try:
            (item,) = encode(lm.tokenizer, [prompt], [answer], add_special_tokens=adds_special_tokens(format))
        except UserError as error:
            raise UserError(f"{title}: {error}") from error
        excerpts.append(Excerpt(title, item.tokens, item.start))
    return excerpts


def rows_of_run(lm: LanguageModel, run: Path, rows: Sequence[int] | None) -> tuple[list[Excerpt], str]:
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
    if not imae_dir.is_imae_dir(run / IMAE_DIR):
        raise UserError(f"{run} holds no {IMAE_DIR}: give the output directory of a finished training run")
    imae = imae_dir.read_config(run / IMAE_DIR)
    recorded = imae["base"]["fingerprint"]
    if recorded != lm.base.fingerprint:
        raise UserError(
            f"{run} was trained on another base than that of --model{note(recorded)}: give a model of "
            "that run"
        )
    settings, trained_on = imae["training"]["config"], imae["training"]["data"]
    if (run / FILTER_DIR).exists():
        gamma = settings["filter"]["gamma"]
        two_sided = settings.get("objective") == "pairs"
        stored = stored_examples(run / FILTER_DIR, gamma, two_sided=two_sided)
        facts = f"T_fact with γ = {gamma:g}"
    else:
        columns = ColumnsConfig(**settings["data"]["columns"])
        config = DataConfig(**settings["data"] | {"columns": columns})
        tokenized = data.tokenize(data.load_rows(config), lm.tokenizer, config)
        stored, facts = tokenized.train + tokenized.held_out, "T_fact is every answer token"
        if any(trained_on.get(name) != value for name, value in tokenized.statistics.items()):
            raise UserError(f"{config.path or config.source} is not what {run} was trained on: restore it")
    examples = {example.row: example for example in stored if not example.right}
    held_out = set(trained_on["held_out_rows"])
    if rows is None:
        rows = sorted(held_out & examples.keys() or examples)[:DEFAULT_ROWS]
    missing = [str(row) for row in rows if row not in examples]
    if missing:
        raise UserError(
            f"{run} has no row {', '.join(missing)}: give rows from {min(examples)} to {max(examples)} that "
            "training did not skip"
        )
    kinds = ["held out" if row in held_out else "trained on" for row in rows]
    return [
        Excerpt(f"row {row}, {kind}", examples[row].tokens, examples[row].start, examples[row].fact)
        for row, kind in zip(rows, kinds, strict=True)
    ], facts
