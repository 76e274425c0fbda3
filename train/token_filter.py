"""T_fact: which tokens of the hallucinated answers are about facts (IMAE, section 3.2)."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from imae_jax.convert import LanguageModel, load_model
from imae_jax.convert.peft import adapter_of, read_adapter
from imae_jax.decode.methods.icd import LogRatio
from imae_jax.decode.methods.imae import Strength
from imae_jax.decode.scoring import score
from imae_jax.errors import UserError
from imae_jax.files import new_directory
from imae_jax.train.data import Example, continuation_of

SAMPLES_SHOWN = 20
FEW, MANY = 0.02, 0.80
RATIO_COLUMN = "log_ratio"
Progress = Callable[[Sequence, str], Sequence]


def filter_tokens(
    examples: Sequence[Example],
    base: LanguageModel,
    anti_expert_llm: str | None,
    gamma: float,
    cache: Path,
    progress: Progress = lambda items, _: items,
) -> tuple[list[Example], dict[str, Any]]:
    """Keeps the answer tokens with `log p_antiLLM − log p_base ≥ γ`.

    The log-ratios are stored in `cache` (Arrow), under a hash of the examples and both models, and
    computed once; γ only thresholds them.

    Args:
        examples: from `data.tokenize`.
        base: the model to be trained on.
        anti_expert_llm: its model reference; None keeps every answer token.
        gamma: γ.
        cache: directory for the log-ratios.
        progress: wraps an iteration to show how far it is.

    Returns:
        The examples with their `fact` marks, and statistics: `kept_share` of answer tokens, also by
        thirds of the answers' length, and `rows_without_facts`, which still train the gate to close.

    Raises:
        UserError: the LLM has another vocabulary than the base, or γ keeps nothing.
    """
    if anti_expert_llm is None:
        return list(examples), {"kept_share": 1.0}
    path = cache / _key(examples, base, anti_expert_llm)
    if not path.exists():
        ratios = _log_ratios(examples, base, anti_expert_llm, progress)
        columns = {
            "row": [e.row for e in examples],
            "tokens": [list(e.tokens) for e in examples],
            "start": [e.start for e in examples],
            RATIO_COLUMN: [r.astype(np.float32).tolist() for r in ratios],
        }
        with new_directory(path, marker="state.json") as temporary:
            datasets.disable_progress_bar()
            datasets.Dataset.from_dict(columns).save_to_disk(str(temporary))
    ratios = [np.asarray(r) for r in datasets.load_from_disk(str(path))[RATIO_COLUMN]]

    filtered = [
        dataclasses.replace(example, fact=tuple((ratio >= gamma).tolist()))
        for example, ratio in zip(examples, ratios, strict=True)
    ]
    lengths = np.array([len(e.fact) for e in filtered])
    kept = np.array([sum(e.fact) for e in filtered])
    if kept.sum() == 0:
        raise UserError(
            f"filter.gamma={gamma} keeps no answer token: lower it, or train the anti-expert LLM longer"
        )
    share = float(kept.sum() / lengths.sum())
    thirds = np.array_split(np.argsort(lengths, kind="stable"), 3)
    statistics = {
        "kept_share": share,
        "kept_share_by_length": {
            f"{lengths[part].min()}-{lengths[part].max()} tokens": float(
                kept[part].sum() / lengths[part].sum()
            )
            for part in thirds
            if len(part)
        },
        "rows_without_facts": int((kept == 0).sum()),
    }
    return filtered, statistics


def _log_ratios(
    examples: Sequence[Example], base: LanguageModel, anti_expert_llm: str, progress: Progress
) -> list[np.ndarray]:
    groups = [[continuation_of(example)] for example in examples]
    adapter = adapter_of(anti_expert_llm, base.base.reference)
    ratios: list[np.ndarray] = [np.zeros(len(example.fact)) for example in examples]
    if adapter is not None:
        # Both models as rows of one batch over the same weights.
        deltas, lora = read_adapter(adapter, base.config, stacked=base.model.stacked)
        weights = dataclasses.replace(base.model.weights(), lora=deltas, lora_scale=lora.scale)
        for i, values in progress(score(weights, base.config, groups, LogRatio()), "token filter"):
            ratios[i] = -values[0]
        return ratios
    llm = load_model(anti_expert_llm)
    check_same_vocabulary(base, llm, anti_expert_llm, examples)
    for model, sign, label in ((base, -1.0, "base"), (llm, 1.0, "anti-expert LLM")):
        scored = score(model.model, model.config, groups, Strength(0.0))
        for i, values in progress(scored, f"token filter: {label}"):
            ratios[i] = ratios[i] + sign * values[0]
    return ratios


def check_same_vocabulary(
    base: LanguageModel, other: LanguageModel, reference: str, examples: Sequence[Example]
) -> None:
    """Raises a `UserError` unless both models give the same tokens to the same text."""
    if other.config.vocab_size != base.config.vocab_size:
        raise UserError(
            f"anti-expert LLM {reference} has {other.config.vocab_size} tokens, the base "
            f"{base.config.vocab_size}: both need the same vocabulary"
        )
    for example in examples[:8]:
        text = base.tokenizer.decode(example.tokens)
        ids = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for lm in (base, other)]
        if ids[0] != ids[1]:
            raise UserError(
                f"anti-expert LLM {reference} tokenizes text differently from the base: both need the "
                "same vocabulary"
            )


def show_filtered(examples: Sequence[Example], tokenizer: Any, statistics: dict[str, Any]) -> None:
    """Prints the share of tokens kept and some answers with those tokens highlighted."""
    from rich.console import Console
    from rich.text import Text

    share = statistics["kept_share"]
    console = Console(stderr=True)
    by_length = ", ".join(f"{k}: {v:.0%}" for k, v in statistics["kept_share_by_length"].items())
    console.print(f"T_fact: {share:.1%} of answer tokens kept ({by_length})", highlight=False)
    for example in examples[:SAMPLES_SHOWN]:
        line = Text("  ")
        for token, fact in zip(example.tokens[example.start :], example.fact, strict=True):
            line.append(tokenizer.decode([token]).replace("\n", "⏎"), style="bold reverse" if fact else "")
        console.print(line)
    if not FEW <= share <= MANY:
        print(
            f"warning: T_fact keeps {share:.1%} of answer tokens: check filter.gamma and the anti-expert LLM",
            file=sys.stderr,
        )


def _key(examples: Sequence[Example], base: LanguageModel, anti_expert_llm: str) -> str:
    """Hash of everything that determines the log-ratios."""
    digest = hashlib.sha256()
    digest.update(json.dumps([base.base.fingerprint, base.base.dtype, anti_expert_llm]).encode())
    directory = Path(anti_expert_llm)
    if directory.is_dir():
        for path in sorted(directory.glob("*.safetensors")):
            stat = path.stat()
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    for example in examples:
        digest.update(json.dumps([example.start, example.tokens]).encode())
    return digest.hexdigest()[:16]
