"""T_fact: which tokens of the answers are about facts (IMAE, section 3.2)."""

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import jax
import numpy as np

from imae_jax.config import LlamaConfig
from imae_jax.convert import LanguageModel, load_model
from imae_jax.convert.peft import Adapter, open_adapter
from imae_jax.convert.references import adapter_of, check_same_vocabulary, fingerprint
from imae_jax.distributed import barrier, decide, is_main, to_host
from imae_jax.errors import UserError, first_line
from imae_jax.files import new_directory
from imae_jax.llama import Weights
from imae_jax.lora import adapter_factors, side_by_side
from imae_jax.losses import token_log_probs
from imae_jax.sharding import row_shards, sharding
from imae_jax.train.data import Example, choose_merging, in_batches, make_batch
from imae_jax.train.objectives import RIGHT, WRONG, at_facts, run
from imae_jax.train.step import place_batch

logger = logging.getLogger(__name__)

SAMPLES_SHOWN = 20
FEW, MANY = 0.02, 0.80
RATIO_COLUMN = "log_ratio"
MARKER = "state.json"  # `datasets` writes it last.
Progress = Callable[[Sequence, str], Sequence]


def filter_tokens(
    examples: Sequence[Example],
    base: LanguageModel,
    models: Sequence[str],
    gamma: float,
    cache: Path,
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    max_length: int,
    reuse: Path | None = None,
    progress: Progress = lambda items, _: items,
) -> tuple[list[Example], dict[str, Any]]:
    """Keeps the answer tokens with `log p_antiLLM − log p_base ≥ γ`, or those with
    `|log p_right − log p_wrong| ≥ γ`.

    The log-ratios are stored in `cache` (Arrow), under a hash of the examples and all models, and
    computed once; γ only thresholds them.

    Args:
        examples: from `data.tokenize`, every answer token in T_fact; with two adapters, both rows of every
            question as neighbours.
        base: the model to be trained on.
        models: reference of the anti-expert LLM; or those of two adapters of the base, trained on right and
            on wrong answers; or none, which keeps every answer token.
        gamma: γ.
        cache: directory for the log-ratios.
        mesh: on which the base lies.
        batch_size: questions at a time.
        max_length: of a row, and of a token tree.
        reuse: another such directory, from which they are copied.
        progress: wraps an iteration to show how far it is.

    Returns:
        The examples with their `fact` marks, and statistics: `kept_share` of answer tokens, also by
        thirds of the answers' length, and `rows_without_facts`, which still train the gate to close.

    Raises:
        UserError: the LLM has another vocabulary than the base, an adapter another base, `reuse` holds no
            such log-ratios, or γ keeps nothing.
    """
    if not models:
        return list(examples), {"kept_share": 1.0}
    adapters = [
        own_adapter(model, base) if len(models) == 2 or adapter_of(model, base.base) else None
        for model in models
    ]
    path = cache / _key(examples, base, models, adapters)
    stored = decide(path.exists())
    if reuse is not None and not stored:
        if not decide((reuse / path.name / MARKER).is_file()):
            raise UserError(
                f"filter.reuse={reuse} holds no log-ratios of these rows, this base and "
                f"{' and '.join(models)}: leave it out to compute them"
            )
        if is_main():
            with new_directory(path, marker=MARKER) as temporary:
                shutil.copytree(reuse / path.name, temporary, dirs_exist_ok=True)
        barrier("log-ratios copied")
        stored = True
    if stored:
        ratios = [np.asarray(r, np.float32) for r in datasets.load_from_disk(str(path))[RATIO_COLUMN]]
    else:
        ratios = _log_ratios(examples, base, models, adapters, mesh, batch_size, max_length, progress)
    if not stored and is_main():
        columns = {
            "row": [e.row for e in examples],
            "tokens": [list(e.tokens) for e in examples],
            "start": [e.start for e in examples],
            "right": [e.right for e in examples],
            RATIO_COLUMN: [r.astype(np.float32).tolist() for r in ratios],
        }
        with new_directory(path, marker=MARKER) as temporary:
            datasets.disable_progress_bar()
            datasets.Dataset.from_dict(columns).save_to_disk(str(temporary))

    filtered = [
        dataclasses.replace(example, fact=_marks(ratio, gamma, two_sided=len(models) == 2))
        for example, ratio in zip(examples, ratios, strict=True)
    ]
    lengths = np.array([len(e.fact) for e in filtered])
    kept = np.array([sum(e.fact) for e in filtered])
    if kept.sum() == 0:
        largest = max(np.abs(r).max() if len(models) == 2 else r.max() for r in ratios)
        raise UserError(
            f"filter.gamma={gamma} keeps no answer token, the largest ratio is {largest:.3g}: go on with "
            "--resume and a lower one, or train stage icd longer"
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


def stored_examples(cache: Path, gamma: float, *, two_sided: bool = False) -> list[Example]:
    """The examples whose log-ratios `filter_tokens` stored, with their T_fact: `two_sided` for two adapters.

    Raises:
        UserError: `cache` does not hold the log-ratios of one run.
    """
    paths = [path.parent for path in cache.glob(f"*/{MARKER}")]
    if len(paths) != 1:
        raise UserError(
            f"{cache} holds {len(paths)} sets of log-ratios where one is needed: give a run that was trained "
            "with a token filter"
        )
    try:
        rows = datasets.load_from_disk(str(paths[0]))
    except Exception as error:  # Arrow's errors share no base class.
        raise UserError(f"{paths[0]} cannot be read: {first_line(error)}") from error
    return [
        Example(
            row["row"],
            tuple(row["tokens"]),
            row["start"],
            _marks(np.asarray(row[RATIO_COLUMN], np.float32), gamma, two_sided),
            row.get("right", False),
        )
        for row in rows
    ]


def _marks(ratios: np.ndarray, gamma: float, two_sided: bool) -> tuple[bool, ...]:
    return tuple(((np.abs(ratios) if two_sided else ratios) >= gamma).tolist())


def own_adapter(reference: str, base: LanguageModel) -> Adapter:
    """Opens a LoRA adapter of exactly this base.

    Raises:
        UserError: the reference is no such adapter.
    """
    path = adapter_of(reference, base.base)
    if path is None:
        raise UserError(
            f"{reference} is no LoRA adapter of {base.base.reference} in PEFT's format: objective=pairs "
            "needs two that were trained on this very base"
        )
    return open_adapter(path, base.config)


def adapter_pair(weights: Weights, adapters: Sequence[Adapter], mesh: jax.sharding.Mesh) -> Weights:
    """The base with both adapters, numbered `objectives.RIGHT` and `WRONG`, side by side."""
    deltas = [(adapter.read(stacked=True, mesh=mesh), adapter.lora.scale) for adapter in adapters]
    with jax.set_mesh(mesh):
        return dataclasses.replace(weights, lora=jax.jit(side_by_side)(deltas))


def _log_ratios(
    examples: Sequence[Example],
    base: LanguageModel,
    models: Sequence[str],
    adapters: Sequence[Adapter | None],
    mesh: jax.sharding.Mesh,
    batch_size: int,
    max_length: int,
    progress: Progress,
) -> list[np.ndarray]:
    """`log p_antiLLM − log p_base`, or `log p_right − log p_wrong`, of every answer token; `adapters` are the
    models that are adapters of this base."""
    weights, config = base.model.weights(), base.config
    strictest = config
    if adapters[0] is not None:
        if len(adapters) == 2:
            weights, numbers = adapter_pair(weights, adapters, mesh), (RIGHT, WRONG)
        else:
            deltas = adapters[0].read(stacked=True, mesh=mesh)
            weights = dataclasses.replace(weights, lora=deltas, lora_scale=adapters[0].lora.scale)
            numbers = (0, None)
        compiled = jax.jit(_ratio_in_one_batch, static_argnums=(1, 3), out_shardings=sharding(mesh))

        def ratio(batch):
            return compiled(weights, config, batch, numbers)
    else:
        (anti_expert_llm,) = models
        llm = load_model(anti_expert_llm, dtype=base.base.dtype, stacked=True, mesh=mesh)
        check_same_vocabulary(base, llm)
        if llm.config.rope.type == "dynamic":
            strictest = llm.config  # Its rows cannot be merged.
        compiled = jax.jit(_answer_log_probs, static_argnums=1, out_shardings=sharding(mesh))

        def ratio(batch):
            anti = compiled(llm.model.weights(), llm.config, batch)
            return anti - compiled(weights, config, batch)

    # Neighbours of about equal length waste little padding.
    size = len(models)
    groups = [range(i, i + size) for i in range(0, len(examples), size)]
    groups.sort(key=lambda group: max(len(examples[i].tokens) for i in group))
    order = [i for group in groups for i in group]
    ratios: list[np.ndarray] = [np.empty(0, np.float32)] * len(examples)
    batches = in_batches([examples[i] for i in order], size * batch_size)
    with jax.set_mesh(mesh):
        merging = choose_merging(batches, strictest, row_shards(mesh), max_length)
        for number, rows in enumerate(progress(batches, "token filter")):
            arrays = place_batch(make_batch(rows, 1, merging=merging), mesh)
            values = to_host(ratio({name: x[0] for name, x in arrays.items()}))
            for i, row in zip(order[number * size * batch_size :], values, strict=False):
                ratios[i] = row[: len(examples[i].fact)]
                if not np.isfinite(ratios[i]).all():
                    raise UserError(
                        f"token filter: log-probabilities of example {i} are not finite with dtype "
                        f"{base.base.dtype}: set dtype=float32 or bfloat16"
                    )
    return ratios


def _answer_log_probs(weights: Weights, config: LlamaConfig, batch: dict[str, jax.Array]) -> jax.Array:
    """Log-probabilities [B, P] of the batch's `fact` tokens; every answer token is one here."""
    hidden, _ = run(weights, config, batch)
    return token_log_probs(weights, at_facts(batch, hidden), batch["fact_targets"])


def _ratio_in_one_batch(
    weights: Weights, config: LlamaConfig, batch: dict[str, jax.Array], numbers: tuple[int | None, int | None]
) -> jax.Array:
    """Difference [B, P] of the models of these numbers, which run as one batch over the same weights."""
    factors = adapter_factors(weights.lora, sum(number is not None for number in numbers), numbers)
    *models, _ = run(weights, config, batch, copies=2, adapter=factors)
    first, second = (
        token_log_probs(weights, at_facts(batch, hidden), batch["fact_targets"]) for hidden in models
    )
    return first - second


def log_statistics(statistics: dict[str, Any]) -> None:
    """Logs the share of tokens kept, and warns of an unlikely one."""
    share = statistics["kept_share"]
    by_length = ", ".join(f"{k}: {v:.0%}" for k, v in statistics["kept_share_by_length"].items())
    logger.info("T_fact: %.1f%% of answer tokens kept (%s)", 100 * share, by_length)
    if not FEW <= share <= MANY:
        logger.warning(
            "T_fact keeps %.1f%% of answer tokens: check filter.gamma and the anti-expert LLM", 100 * share
        )


def show_filtered(examples: Sequence[Example], tokenizer: Any) -> None:
    """Prints some answers with the tokens of T_fact highlighted."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    for example in examples[:SAMPLES_SHOWN]:
        line = Text("  ")
        for token, fact in zip(example.tokens[example.start :], example.fact, strict=True):
            line.append(tokenizer.decode([token]).replace("\n", "⏎"), style="bold reverse" if fact else "")
        console.print(line)


def _key(
    examples: Sequence[Example],
    base: LanguageModel,
    models: Sequence[str],
    adapters: Sequence[Adapter | None],
) -> str:
    """Hash of everything that determines the log-ratios."""
    digest = hashlib.sha256()
    # Another model is read for this alone: if the log-ratios are there, it is not needed in memory.
    compared = [
        fingerprint(model) if adapter is None else adapter.fingerprint(base.base.fingerprint)
        for model, adapter in zip(models, adapters, strict=True)
    ]
    models = [base.base.fingerprint, base.base.dtype, *compared]
    digest.update(json.dumps(models).encode())
    for example in examples:
        digest.update(json.dumps([example.start, example.tokens]).encode())
    return digest.hexdigest()[:16]
