"""In-model contrast: `β · log p_base(v) − log p_anti(v)` over tokens that the base finds plausible.

Both modes of one IMAE model run as rows of one batch, over the same weights and in one key/value cache.

    model.generate(**inputs, custom_generate=DIRECTORY, trust_remote_code=True, beta=1.0, alpha=0.1)

Sources: Kadotani, Nishida, Nishida, "Learning from Hallucinations", Findings of IJCNLP-AACL 2025; the
plausibility constraint: Li et al., "Contrastive Decoding", arXiv 2210.15097.
"""

import functools
import math

import torch
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerateDecoderOnlyOutput


def generate(model, *args, beta=1.0, alpha=0.1, anti_strength=1.0, renormalize=False, **kwargs):
    """As transformers' `generate`, greedy or sampling, with every logits processor and stopping criterion.

    Args:
        model: an IMAE model; the mode that it is set to does not matter.
        args, kwargs: arguments of transformers' `generate`.
        beta: weight of the base term.
        alpha: tokens whose probability in base mode is below `alpha` times the largest one get -inf; 0 keeps
            all.
        anti_strength: strength of the anti-expert rows.
        renormalize: log-softmax of the difference, before implausible tokens are masked.

    Raises:
        ValueError: a setting that makes no sense, beam search, or a model without modes.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} must be between 0 and 1")
    if not (math.isfinite(beta) and math.isfinite(anti_strength)):
        raise ValueError(f"beta {beta} and anti_strength {anti_strength} must be finite")
    if not hasattr(model, "set_mode"):
        raise ValueError(f"a {type(model).__name__} has no anti-expert mode: use an IMAE model")
    # transformers passes neither streamer nor tokenizer on to a function of ours.
    tokenizer, stop_strings = kwargs.pop("tokenizer", None), kwargs.pop("stop_strings", None)
    if stop_strings is not None:
        if tokenizer is None:
            raise ValueError("stop_strings need the tokenizer: pass tokenizer=…")
        stop = StopStringCriteria(tokenizer, stop_strings)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), stop])
    decode = functools.partial(
        _decode,
        score=functools.partial(_score, beta=beta, alpha=alpha, renormalize=renormalize),
        anti_strength=anti_strength,
        streamer=kwargs.get("streamer"),
    )
    # Not `model.generate`, which transformers replaces by this function in models that do not mind.
    return GenerationMixin.generate(model, *args, custom_generate=decode, **kwargs)


def _score(logits, *, beta, alpha, renormalize):
    """Logits of base rows, then of anti-expert rows [2 B, V] to scores [B, V]."""
    base, anti = logits.float().log_softmax(-1).chunk(2)
    scores = beta * base - anti
    if renormalize:
        scores = scores.log_softmax(-1)
    if alpha == 0:
        return scores
    return scores.masked_fill(base < base.amax(-1, keepdim=True) + math.log(alpha), -math.inf)


def _decode(model, input_ids, *, score, anti_strength, streamer, generation_config, **kwargs):
    """The loop over tokens, which takes the place of transformers' `_sample`."""
    if generation_config.num_beams > 1:
        raise ValueError("in-model contrast searches no beams: set num_beams=1")
    logits_processor, stopping_criteria = kwargs["logits_processor"], kwargs["stopping_criteria"]
    input_ids = input_ids.to(model.device)
    rows = input_ids.shape[0]
    mode = torch.tensor([0.0, anti_strength], device=input_ids.device).repeat_interleave(rows)
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids)
    pad = generation_config._pad_token_tensor
    open_rows = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
    tokens, cache, kept = input_ids, None, ()
    while open_rows.any():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = model(
            input_ids=tokens.repeat(2, 1),
            attention_mask=mask.repeat(2, 1),
            position_ids=positions.repeat(2, 1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            mode=mode,
        )
        cache = output.past_key_values
        scores = logits_processor(input_ids, score(output.logits[:, -1].to(input_ids.device)))
        if generation_config.output_scores:
            kept += (scores,)
        if generation_config.do_sample:
            drawn = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            drawn = scores.argmax(-1)
        if pad is not None:
            drawn = torch.where(open_rows, drawn, pad)
        if streamer is not None:
            streamer.put(drawn.cpu())
        tokens = drawn[:, None]
        input_ids = torch.cat([input_ids, tokens], dim=-1)
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=-1)
        open_rows = open_rows & ~stopping_criteria(input_ids, kept)
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=kept or None, past_key_values=cache)
    return input_ids
