"""The logits of an export, for verifying it. Not shipped with exports."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers

from . import modeling_imae


def logits_of(
    directory: Path,
    num_layers: int,
    tokens: np.ndarray,
    mask: np.ndarray,
    *,
    modes: Mapping[str, float],
    attention: str,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Runs the lowest layers of an export in transformers, on the CPU.

    The modules are those that it ships, without a copy of them in transformers' cache.

    Args:
        directory: the export.
        num_layers: how many.
        tokens, mask: [B, T]; the mask is False at padding.
        modes: names that the model knows.
        attention: transformers' implementation: `sdpa` or `eager`.

    Returns:
        By mode float32 [B, T, V], and the versions of torch and transformers.
    """
    hf = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = getattr(modeling_imae, hf["architectures"][0])
    transformers.utils.logging.disable_progress_bar()
    model = kind.from_pretrained(
        directory, dtype="auto", num_hidden_layers=num_layers, attn_implementation=attention
    ).eval()
    inputs = {"input_ids": torch.as_tensor(tokens), "attention_mask": torch.as_tensor(mask).long()}
    # Positions count real tokens, as `generate` has it; a bare call of transformers counts padding, too.
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = {mode: model(**inputs, mode=mode).logits.float().numpy() for mode in modes}
    return logits, {"torch": torch.__version__, "transformers": transformers.__version__}
