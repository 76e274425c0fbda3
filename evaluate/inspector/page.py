"""The inspector's page: token texts, and arrays packed for `page.js`; nothing comes from the network."""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from imae_jax.evaluate.inspector.compute import MODE_NAMES, Excerpt, Inspection, summarize
from imae_jax.tokenizer import INCOMPLETE

ASSETS = Path(__file__).parent
GENERATOR = "imae_jax.evaluate.inspector"
# The longest run of tokens that is tried as one text where a character is cut into several.
LONGEST_RUN = 8


def token_texts(tokenizer: Any, runs: Iterable[Sequence[int]]) -> list[str]:
    """The text of each run of tokens where text stands before it; cut characters become U+FFFD."""
    # At the beginning of a text SentencePiece would drop a leading space.
    before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    skip = len(tokenizer.decode(before, **options))
    return [tokenizer.decode([*before, *run], **options)[skip:] for run in runs]


def cut_characters(tokenizer: Any, tokens: Sequence[int], texts: dict[int, str]) -> dict[int, str]:
    """Texts to show, by index, where a character is cut into several tokens: the first one gets it."""
    shown, start = {}, 0
    while start < len(tokens):
        end = start + 1
        if INCOMPLETE in texts[tokens[start]]:
            ends = range(start + 2, min(start + LONGEST_RUN, len(tokens)) + 1)
            runs = zip(ends, token_texts(tokenizer, [tokens[start:end] for end in ends]), strict=True)
            end, text = next((run for run in runs if INCOMPLETE not in run[1]), (end, None))
            if text is not None:
                shown |= {start: text} | dict.fromkeys(range(start + 1, end), "")
        start = end
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
        tokenizer: tokenizer of the model.
        excerpts: inspected texts.
        inspections: results of `inspect`, one for each excerpt.
        model: name of the model, for the heading.
        settings: facts on how the page was made, as text by name.
    """
    ids = {int(i) for x in inspections for i in np.unique(x.top_tokens)}
    ids = sorted(ids.union(*(excerpt.tokens for excerpt in excerpts)))
    texts = dict(zip(ids, token_texts(tokenizer, [[i] for i in ids]), strict=True))
    shown = [cut_characters(tokenizer, excerpt.tokens, texts) for excerpt in excerpts]
    texts |= {
        i: byte_name(tokenizer.convert_ids_to_tokens(i)) for i, text in texts.items() if INCOMPLETE in text
    }
    data = {
        "modes": MODE_NAMES,
        "layers": inspections[0].gates.shape[1],
        "top": inspections[0].top_tokens.shape[-1],
        "texts": texts,
        "summary": summarize(excerpts, inspections),
        "excerpts": [_packed(*each) for each in zip(excerpts, inspections, shown, strict=True)],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    style, script = (
        Markup((ASSETS / name).read_text(encoding="utf-8").strip()) for name in ("page.css", "page.js")
    )
    return environment.get_template("page.html").render(
        style=style,
        script=script,
        generator=GENERATOR,
        model=model,
        settings=settings,
        modes=MODE_NAMES,
        layers=data["layers"],
        data=data,
    )


def _packed(excerpt: Excerpt, inspection: Inspection, shown: dict[int, str]) -> dict[str, Any]:
    facts = None if excerpt.fact is None else np.flatnonzero(excerpt.regions()["T_fact"]).tolist()
    return {
        "title": excerpt.title,
        "length": len(excerpt.tokens),
        "start": excerpt.start,
        "facts": facts,
        "shown": shown,
        "tokens": _base64(np.array(excerpt.tokens), "<u4"),
        "gates": _base64(np.rint(255 * inspection.gates), "u1"),
        "logProbs": _base64(inspection.log_probs, "<f4"),
        "topTokens": _base64(inspection.top_tokens, "<u4"),
        "topLogProbs": _base64(inspection.top_log_probs, "<f4"),
        "context": _base64(inspection.context, "<u4"),
    }


def _base64(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array.astype(dtype)).tobytes()).decode()
