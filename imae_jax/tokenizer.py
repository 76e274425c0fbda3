"""Text to token ids and back, by the checkpoint's own rules."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from imae_jax import chat_template
from imae_jax.chat_template import ChatTemplateError
from imae_jax.errors import UserError, first_line

# What `clean_up_tokenization_spaces` replaces, in this order.
_CLEAN_UP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {part}", part) for part in ("n't", "'m", "'s", "'ve", "'re")),
)
# What may still become one of these when text follows.
_UNCLEAN_END = re.compile(r"[ ']+(?:n'?|[vr])?\Z")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
INCOMPLETE = "\ufffd"


@contextlib.contextmanager
def damage_in(location: str | Path) -> Iterator[None]:
    """A `UserError` where a call of the tokenizers package refuses what a file holds.

    It raises plain Exceptions: only its calls belong in such a block.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"the tokenizer in {location} cannot be loaded ({first_line(error)}): pass --tokenizer DIRECTORY"
        ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tokenizers.Tokenizer` with what the files beside it say.

    Its methods are a small part of transformers' tokenizers, under their names.

    Attributes:
        backend_tokenizer: gives ids and text; its post-processor adds the tokens that begin and end a text.
        special_tokens: texts of `bos_token`, `eos_token`, `unk_token` and `pad_token`, where it has them.
        chat_templates: by name; the one that is used is `default`.
        clean_up_tokenization_spaces: whether decoded text loses blanks before punctuation, as the checkpoint
            asks.
        config: what else `tokenizer_config.json` of an export holds.
        files: files of the checkpoint, for an export to copy.
    """

    backend_tokenizer: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clean_up_tokenization_spaces: bool = False
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that ids and text depend on, wherever its files are."""
        parts = [
            self.backend_tokenizer.to_str(),
            dict(self.special_tokens),
            dict(self.chat_templates),
            self.clean_up_tokenization_spaces,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> dict[str, Any]:
        """Token ids of a text, or a list of them of several, as `input_ids`.

        Args:
            text: one or several.
            add_special_tokens: whether tokens that begin and end a text (BOS, EOS) may be added.
        """
        if isinstance(text, str):
            return {
                "input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            }
        encoded = self.backend_tokenizer.encode_batch(list(text), add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encoded]}

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of token ids.

        Args:
            ids: to decode.
            skip_special_tokens: leaves out special tokens.
            clean_up_tokenization_spaces: default: as the checkpoint asks.
        """
        text = self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        clean_up = clean_up_tokenization_spaces
        if self.clean_up_tokenization_spaces if clean_up is None else clean_up:
            text = _clean_up(text)
        return text

    def continuation(self, prompt: Sequence[int], new: Sequence[int], *, finished: bool = True) -> str:
        """The text of new tokens after a prompt, without special tokens.

        Alone, they would lose a leading space with SentencePiece.

        Args:
            prompt, new: token ids.
            finished: whether no token follows. If not, the end that a later token can change is left out
                (an unfinished character, blanks that may be cleaned up): the text of more tokens begins with
                the text that is returned.
        """
        if not finished:
            # Byte tokens that are no character together become U+FFFD, all of them.
            new, end = list(new), len(new)
            while end and (new[end - 1] in self._special_ids or self._is_byte(new[end - 1])):
                end -= 1
            new = new[:end]
        before, whole = (
            self.backend_tokenizer.decode(list(ids), skip_special_tokens=True)
            for ids in (prompt, [*prompt, *new])
        )
        if whole.startswith(before):
            text = whole[len(before) :]
        else:
            text = self.backend_tokenizer.decode(list(new), skip_special_tokens=True)
        if not finished:
            text = text.rstrip(INCOMPLETE)
        if self.clean_up_tokenization_spaces:
            text = _clean_up(text if finished else _UNCLEAN_END.sub("", text))
        return text

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        """The token as it is in the vocabulary; None where there is none."""
        return self.backend_tokenizer.id_to_token(token_id)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token of the vocabulary; None where it is none."""
        return self.backend_tokenizer.token_to_id(token)

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens, which do not appear in text, by what they are written as in prompts."""
        added = self.backend_tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_ids.values())

    def _is_byte(self, token_id: int) -> bool:
        return bool(_BYTE_TOKEN.fullmatch(self.convert_ids_to_tokens(token_id) or ""))

    @property
    def chat_template(self) -> str | None:
        """The one that is used; None where the checkpoint has none.

        Raises:
            ChatTemplateError: it has several, none of them `default`.
        """
        if self.chat_templates and "default" not in self.chat_templates:
            names = ", ".join(map(repr, self.chat_templates))
            raise ChatTemplateError(f"the tokenizer's chat templates are {names}, none of them 'default'")
        return self.chat_templates.get("default")

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool = True, **options: Any
    ) -> Any:
        """What the chat template makes of messages (`role`, `content`), the same on every day.

        Args:
            messages: the conversation.
            tokenize: False gives text, True its token ids as `__call__` does, BOS as the template writes it.
            options: options of `chat_template.render`.

        Raises:
            ChatTemplateError: there is none, or it cannot be used.
        """
        if self.chat_template is None:
            raise ChatTemplateError("the tokenizer has no chat template")
        text = chat_template.render(self.chat_template, messages, **(dict(self.special_tokens) | options))
        return self(text, add_special_tokens=False) if tokenize else text

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id(self.eos_token)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.convert_tokens_to_ids(token)


def _clean_up(text: str) -> str:
    for pattern, replacement in _CLEAN_UP:
        text = text.replace(pattern, replacement)
    return text
