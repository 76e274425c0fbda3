"""The logits of an export, for verifying it. Not shipped with exports."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from . import modeling_imae


def logits_of(
    directory: Path,
    num_layers: int,
    tokens: np.ndarray,
    mask: np.ndarray,
    *,
    modes: Mapping[str, float],
    dtype: str,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Runs the lowest layers of an export in transformers, on the CPU.

    The modules are those that it ships, without a copy of them in transformers' cache.

    Args:
        directory: the export.
        num_layers: number of lowest layers to run.
        tokens, mask: [B, T]; the mask is False at padding.
        modes: names that the model knows.
        dtype: dtype of all computations. In float64 also of the norms, which transformers casts to float32.

    Returns:
        By mode [B, T, V], float32 or float64, and the versions of torch and transformers.
    """
    hf = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = getattr(modeling_imae, hf["architectures"][0])
    cut = {"num_hidden_layers": num_layers}
    if "layer_types" in hf:
        cut["layer_types"] = hf["layer_types"][:num_layers]
    transformers.utils.logging.disable_progress_bar()
    model = kind.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="sdpa", **cut
    ).eval()
    if dtype == "float64":
        for norm in [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]:
            is_gemma3 = isinstance(norm, Gemma3RMSNorm)
            norm.forward = functools.partial(
                nn.functional.rms_norm,
                normalized_shape=norm.weight.shape,
                weight=norm.weight + 1 if is_gemma3 else norm.weight,
                eps=norm.eps if is_gemma3 else norm.variance_epsilon,
            )
    inputs = {"input_ids": torch.as_tensor(tokens), "attention_mask": torch.as_tensor(mask).long()}
    # Positions count real tokens, as `generate` has it; a bare call of transformers counts padding, too.
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = {mode: model(**inputs, mode=mode).logits for mode in modes}
        logits = {
            mode: x.to(torch.promote_types(x.dtype, torch.float32)).numpy() for mode, x in logits.items()
        }
    return logits, {"torch": torch.__version__, "transformers": transformers.__version__}
