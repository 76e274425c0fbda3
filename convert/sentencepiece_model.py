"""SentencePiece models as tokenizers: of a `tokenizer.model`, and of the pieces that GGUF metadata hold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from imae_jax.errors import UserError, first_line
from imae_jax.tokenizer import damage_in

SPACE = "▁"
UNIGRAM, BPE = 1, 2


def merges_of(pieces: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of SentencePiece's BPE, which joins the pair whose piece has the highest score."""
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, score in zip(pieces, scores, strict=True):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def build(
    model: models.Model,
    *,
    prefix: bool,
    special: Sequence[AddedToken],
    prefix_once: bool = False,
    clean: Sequence[normalizers.Normalizer] = (),
) -> tokenizers.Tokenizer:
    """A tokenizer that writes spaces as `▁` and unknown characters as bytes.

    Args:
        model: tokenizer model with the pieces.
        prefix: whether a text gets a space at its beginning, and loses one when it is decoded.
        special: tokens that are found as they are written.
        prefix_once: whether what follows a special token gets no such space.
        clean: normalization of a text before it is split.
    """
    tokenizer = tokenizers.Tokenizer(model)
    steps = [*clean, normalizers.Replace(" ", SPACE)]
    if prefix and prefix_once:
        # Special tokens are looked for after normalization, which must leave them as they are.
        names = "|".join(_escaped(token.content) for token in special)
        steps.append(normalizers.Replace(Regex(rf"\A(?!{names})" if names else r"\A"), SPACE))
        special = [AddedToken(t.content, special=t.special, normalized=True) for t in special]
    elif prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if prefix else decoding)
    tokenizer.add_tokens(special)
    return tokenizer


def _escaped(text: str) -> str:
    return "".join(rf"\x{{{ord(character):x}}}" for character in text.replace(" ", SPACE))


def read_model(path: Path, *, legacy: bool) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer of a SentencePiece file, and what its special tokens are named.

    Args:
        path: file to read.
        legacy: whether text after a special token gets a space, too, as `tokenizer_config.json` says.

    Raises:
        UserError: sentencepiece is not installed, or the file is no SentencePiece model that can be read.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} is a SentencePiece model without a tokenizer.json beside it: pip install "
            "'imae_jax[sentencepiece]', or pass --tokenizer DIRECTORY with a tokenizer.json"
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): {_HINT}") from error
    try:
        proto.ParseFromString(content)
    except Exception as error:  # protobuf's own, which differs among its implementations.
        raise UserError(f"{path} is no SentencePiece model ({first_line(error)}): {_HINT}") from error
    trainer, rules, kind = proto.trainer_spec, proto.normalizer_spec, type(proto).SentencePiece
    if trainer.model_type not in (UNIGRAM, BPE) or not proto.pieces or trainer.treat_whitespace_as_suffix:
        raise UserError(f"{path} is no SentencePiece model of kind BPE or unigram: {_HINT}")
    pieces = [piece.piece for piece in proto.pieces]
    if not 0 <= trainer.unk_id < len(pieces):
        raise UserError(f"{path} has no piece {trainer.unk_id}, which is its unk_id: {_HINT}")
    clean = []
    if trainer.model_type == BPE:
        usable = [piece for piece in proto.pieces if piece.type in (kind.NORMAL, kind.USER_DEFINED)]
        merges = merges_of([piece.piece for piece in usable], [piece.score for piece in usable])
        with damage_in(path):
            model = models.BPE(
                {piece: i for i, piece in enumerate(pieces)},
                merges,
                unk_token=pieces[trainer.unk_id],
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
    else:
        vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
        with damage_in(path):
            model = models.Unigram(vocabulary, trainer.unk_id, trainer.byte_fallback)
    if rules.precompiled_charsmap:
        with damage_in(path):
            clean.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        # At the end SentencePiece takes its sign for a space away, too.
        replaced = {rf"\A +|[ {SPACE}]+\Z": "", " {2,}": " "}
        clean += [normalizers.Replace(Regex(pattern), text) for pattern, text in replaced.items()]
    tokenizer = build(
        model,
        prefix=rules.add_dummy_prefix,
        prefix_once=not legacy,
        special=[
            AddedToken(piece.piece, special=piece.type == kind.CONTROL, normalized=False)
            for piece in proto.pieces
            if piece.type in (kind.CONTROL, kind.USER_DEFINED)
        ],
        clean=clean,
    )
    ids = {name: getattr(trainer, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    return tokenizer, {f"{name}_token": pieces[i] for name, i in ids.items() if 0 <= i < len(pieces)}


_HINT = "pass --tokenizer DIRECTORY with a tokenizer.json"
