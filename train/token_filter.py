"""T_fact: which tokens of the hallucinated answers are about facts (IMAE, section 3.2)."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from imae_jax.convert import LanguageModel, load_model
from imae_jax.decode.methods.imae import Strength
from imae_jax.decode.scoring import score
from imae_jax.errors import UserError
from imae_jax.train.config import TokenFilterConfig
from imae_jax.train.data import Example, continuation_of


def filter_tokens(
    examples: Sequence[Example],
    base: LanguageModel,
    config: TokenFilterConfig,
    progress: Callable[[Sequence[Example], str], Sequence[Example]] = lambda items, _: items,
) -> tuple[list[Example], dict[str, float]]:
    """Keeps the answer tokens with `log p_antiLLM − log p_base ≥ γ`.

    Args:
        examples: from `data.tokenize`.
        base: the model to be trained on.
        config: names the anti-expert LLM and γ; without an LLM every answer token is kept.
        progress: wraps an iteration to show how far it is.

    Returns:
        The examples with their `fact` marks, and `kept_share`: the share of answer tokens in T_fact.

    Raises:
        UserError: the LLM has another vocabulary than the base, or γ keeps nothing.
    """
    if config.anti_expert_llm is None:
        return list(examples), {"kept_share": 1.0}
    llm = load_model(config.anti_expert_llm)
    if llm.config.vocab_size != base.config.vocab_size:
        raise UserError(
            f"anti-expert LLM {config.anti_expert_llm} has {llm.config.vocab_size} tokens, the base "
            f"{base.config.vocab_size}: both need the same vocabulary"
        )
    probe = [example.tokens for example in examples[:8]]
    texts = [base.tokenizer.decode(tokens) for tokens in probe]
    if any(
        llm.tokenizer(text, add_special_tokens=False)["input_ids"]
        != base.tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in texts
    ):
        raise UserError(
            f"anti-expert LLM {config.anti_expert_llm} tokenizes text differently from the base: both "
            "need the same vocabulary"
        )
    ratios: list[np.ndarray | None] = [None] * len(examples)
    for model, sign, label in ((base, -1.0, "base"), (llm, 1.0, "anti-expert LLM")):
        groups = [[continuation_of(example)] for example in examples]
        scored = score(model.model, model.config, groups, Strength(0.0))
        for i, values in progress(scored, f"token filter: {label}"):
            ratios[i] = sign * values[0] + (0.0 if ratios[i] is None else ratios[i])
    filtered = [
        dataclasses.replace(example, fact=tuple((ratio >= config.gamma).tolist()))
        for example, ratio in zip(examples, ratios, strict=True)
    ]
    kept = sum(sum(example.fact) for example in filtered)
    total = sum(len(example.fact) for example in filtered)
    if kept == 0:
        raise UserError(
            f"filter.gamma={config.gamma} keeps no answer token: lower it, or train the anti-expert "
            "LLM longer"
        )
    return [example for example in filtered if any(example.fact)], {"kept_share": kept / total}
