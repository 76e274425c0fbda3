"""T_fact: which tokens of the answers are about facts (IMAE, section 3.2)."""

import dataclasses
import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imae_jax.config import LlamaConfig
from imae_jax.convert import LanguageModel, load_model
from imae_jax.convert.peft import Adapter, open_adapter
from imae_jax.convert.references import adapter_of, check_same_vocabulary, fingerprint
from imae_jax.distributed import barrier, decide, is_main, to_host
from imae_jax.errors import UserError, first_line
from imae_jax.files import new_directory
from imae_jax.llama import Interventions, Weights
from imae_jax.lora import adapter_factors, side_by_side
from imae_jax.losses import token_log_probs
from imae_jax.sharding import row_shards, sharding
from imae_jax.train.config import TrainConfig
from imae_jax.train.data import Example, choose_merging, in_batches, make_batch
from imae_jax.train.objectives import RIGHT, WRONG, at_facts, run
from imae_jax.train.step import place_batch

logger = logging.getLogger(__name__)

SAMPLES_SHOWN = 20
FEW, MANY = 0.02, 0.80
RATIOS_FILE = "log_ratios.npz"
EARLIER_FILE = "state.json"  # Earlier versions stored log-ratios as a data set, which ends with this file.
Progress = Callable[[Sequence, str], Iterable]


def filter_tokens(
    examples: Sequence[Example],
    base: LanguageModel,
    models: Sequence[str],
    config: TrainConfig,
    cache: Path,
    *,
    mesh: jax.sharding.Mesh,
    progress: Progress = lambda items, _: items,
) -> tuple[list[Example], dict[str, Any]]:
    """Keeps the answer tokens with `log p_antiLLM − log p_base ≥ γ`, or those with
    `|log p_right − log p_wrong| ≥ γ`.

    The log-ratios are stored in `cache`, under a hash of the examples and all models, and computed once; γ
    only thresholds them.

    Args:
        examples: from `data.tokenize`, every answer token in T_fact; with two adapters, both rows of every
            question as neighbours.
        base: the model to be trained on.
        models: reference of the anti-expert LLM; or those of two adapters of the base, trained on right and
            on wrong answers.
        config: settings of the run: γ, another such directory to take log-ratios from, sizes of batches.
        cache: directory for the log-ratios.
        mesh: on which the base lies.
        progress: wraps an iteration to show how far it is.

    Returns:
        The examples with their `fact` marks, and statistics: `kept_share` of answer tokens, also by
        thirds of the answers' length, and `rows_without_facts`, which still train the gate to close.

    Raises:
        UserError: the LLM has another vocabulary than the base, an adapter another base, `filter.reuse` holds
            no such log-ratios, or γ keeps nothing.
    """
    two_sided, gamma, reuse = len(models) == 2, config.filter.gamma, config.filter.reuse
    adapters = [open_base_adapter(m, base) if two_sided or adapter_of(m, base.base) else None for m in models]
    path = cache / _key(examples, base, models, adapters)
    source = path if reuse is None or decide((path / RATIOS_FILE).is_file()) else Path(reuse) / path.name
    if decide((source / RATIOS_FILE).is_file()):
        mend = f"remove {path}" if source == path else "remove filter.reuse"
        stored, ratios = _read(source, f"{mend} to compute them again")
        if [e.tokens for e in stored] != [e.tokens for e in examples]:
            raise UserError(f"{source / RATIOS_FILE} holds other rows: {mend} to compute them again")
    elif reuse is not None:
        _check_version(Path(reuse), "remove filter.reuse to compute them again")
        raise UserError(
            f"filter.reuse={reuse} holds no log-ratios of these rows, this base and {' and '.join(models)}: "
            "remove it to compute them"
        )
    else:
        ratios = _log_ratios(examples, base, _ratio_function(base, models, adapters, mesh), config, progress)
    if is_main() and not path.exists():
        with new_directory(path, marker=RATIOS_FILE) as temporary:
            _write(temporary, examples, ratios)
    barrier("log-ratios stored")
    filtered = [
        dataclasses.replace(example, fact=_marks(ratio, gamma, two_sided))
        for example, ratio in zip(examples, ratios, strict=True)
    ]
    if not any(any(example.fact) for example in filtered):
        largest = max(np.abs(r).max() if two_sided else r.max() for r in ratios)
        raise UserError(
            f"filter.gamma={gamma} keeps no answer token, the largest ratio is {largest:.3g}: resume with "
            "--resume and a lower one, or train stage icd longer"
        )
    return filtered, _statistics(filtered)


def _statistics(filtered: Sequence[Example]) -> dict[str, Any]:
    lengths = np.array([len(e.fact) for e in filtered])
    kept = np.array([sum(e.fact) for e in filtered])
    thirds = filter(len, np.array_split(np.argsort(lengths, kind="stable"), 3))
    return {
        "kept_share": float(kept.sum() / lengths.sum()),
        "kept_share_by_length": {
            f"{lengths[rows].min()}-{lengths[rows].max()} tokens": float(
                kept[rows].sum() / lengths[rows].sum()
            )
            for rows in thirds
        },
        "rows_without_facts": int((kept == 0).sum()),
    }


def stored_examples(cache: Path, gamma: float, *, two_sided: bool = False) -> list[Example]:
    """The examples whose log-ratios `filter_tokens` stored, with their T_fact: `two_sided` for two adapters.

    Raises:
        UserError: `cache` does not hold the log-ratios of one run.
    """
    examples, ratios = read_log_ratios(cache)
    return [
        dataclasses.replace(example, fact=_marks(ratio, gamma, two_sided))
        for example, ratio in zip(examples, ratios, strict=True)
    ]


def read_log_ratios(cache: Path) -> tuple[list[Example], list[np.ndarray]]:
    """The examples of a run's token filter, every answer token in T_fact, and float32 log-ratios of these.

    Raises:
        UserError: `cache` does not hold the log-ratios of one run.
    """
    stored = [path.parent for path in cache.glob(f"*/{RATIOS_FILE}")]
    if len(stored) != 1:
        _check_version(cache, "train again, or give a run of this version")
        raise UserError(
            f"{cache} holds {len(stored)} sets of log-ratios where one is needed: give a run that was "
            "trained with a token filter"
        )
    return _read(stored[0], "restore it, or give another run")


def _write(directory: Path, examples: Sequence[Example], ratios: Sequence[np.ndarray]) -> None:
    np.savez(
        directory / RATIOS_FILE,
        row=[e.row for e in examples],
        start=[e.start for e in examples],
        right=[e.right for e in examples],
        length=[len(e.tokens) for e in examples],
        tokens=np.concatenate([np.asarray(e.tokens, np.int32) for e in examples]),
        log_ratio=np.concatenate(ratios).astype(np.float32),
    )


def _check_version(cache: Path, mend: str) -> None:
    """Raises a `UserError` if all log-ratios there are of an earlier version; `mend` says what to do."""
    if any(cache.glob(f"*/{EARLIER_FILE}")) and not any(cache.glob(f"*/{RATIOS_FILE}")):
        raise UserError(f"{cache} holds log-ratios of an earlier version, which are no longer read: {mend}")


def _read(directory: Path, mend: str) -> tuple[list[Example], list[np.ndarray]]:
    """What `_write` wrote; `mend` says what to do about a damaged file."""
    try:
        with np.load(directory / RATIOS_FILE) as file:
            arrays = {name: file[name] for name in ("row", "start", "right", "length", "tokens", "log_ratio")}
        length, start = arrays["length"], arrays["start"]
        if (length.sum(), (length - start).sum()) != (arrays["tokens"].size, arrays["log_ratio"].size):
            raise ValueError("its arrays do not belong together")
        tokens = np.split(arrays["tokens"], np.cumsum(length)[:-1])
        ratios = np.split(arrays["log_ratio"], np.cumsum(length - start)[:-1])
        examples = [
            Example(int(row), tuple(ids.tolist()), int(begin), (True,) * (len(ids) - int(begin)), bool(right))
            for row, ids, begin, right in zip(arrays["row"], tokens, start, arrays["right"], strict=True)
        ]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{directory / RATIOS_FILE} cannot be read ({first_line(error)}): {mend}") from error
    return examples, ratios


def _marks(ratios: np.ndarray, gamma: float, two_sided: bool) -> tuple[bool, ...]:
    return tuple(((np.abs(ratios) if two_sided else ratios) >= gamma).tolist())


def open_base_adapter(reference: str, base: LanguageModel) -> Adapter:
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


@dataclasses.dataclass(frozen=True)
class _Ratio:
    """How log-ratios are computed.

    Attributes:
        compute: log-ratios [B, P] of the arrays of a batch.
        rows: that each question has in it.
        llama: config of the model that merges rows least.
        mesh: on which the models lie.
    """

    compute: Callable[[dict[str, jax.Array]], jax.Array]
    rows: int
    llama: LlamaConfig
    mesh: jax.sharding.Mesh


def _ratio_function(
    base: LanguageModel,
    models: Sequence[str],
    adapters: Sequence[Adapter | None],
    mesh: jax.sharding.Mesh,
) -> _Ratio:
    """`log p_antiLLM − log p_base`, or `log p_right − log p_wrong`, from models or adapters of the base."""
    weights, config = base.model.weights(), base.config
    if adapters[0] is None:
        (reference,) = models
        llm = load_model(reference, dtype=base.base.dtype, stacked=True, mesh=mesh)
        check_same_vocabulary(base, llm)
        log_probs = jax.jit(_answer_log_probs, static_argnums=1, out_shardings=sharding(mesh))

        def difference(batch):
            anti = log_probs(llm.model.weights(), llm.config, batch)
            return anti - log_probs(weights, config, batch)

        # Rows of dynamic RoPE cannot be merged.
        return _Ratio(difference, 1, llm.config if llm.config.rope.type == "dynamic" else config, mesh)
    if len(adapters) == 2:
        weights, numbers = adapter_pair(weights, adapters, mesh), (RIGHT, WRONG)
    else:
        deltas = adapters[0].read(stacked=True, mesh=mesh)
        weights = dataclasses.replace(weights, lora=deltas, lora_scale=adapters[0].lora.scale)
        numbers = (0, None)
    compiled = jax.jit(_ratio_in_one_batch, static_argnums=(1, 3), out_shardings=sharding(mesh))
    return _Ratio(lambda batch: compiled(weights, config, batch, numbers), len(models), config, mesh)


def _log_ratios(
    examples: Sequence[Example], base: LanguageModel, ratio: _Ratio, config: TrainConfig, progress: Progress
) -> list[np.ndarray]:
    """Log-ratios of every example's answer tokens."""
    # Neighbours of about equal length waste little padding.
    groups = [range(i, i + ratio.rows) for i in range(0, len(examples), ratio.rows)]
    groups.sort(key=lambda group: max(len(examples[i].tokens) for i in group))
    order = [i for group in groups for i in group]
    size = ratio.rows * (config.batch_size // config.accumulation)
    batches = in_batches([examples[i] for i in order], size)
    ratios: list[np.ndarray] = [np.empty(0, np.float32)] * len(examples)
    with jax.set_mesh(ratio.mesh):
        merging = choose_merging(batches, ratio.llama, row_shards(ratio.mesh), config.data.max_length)
        for number, rows in enumerate(progress(batches, "token filter")):
            arrays = place_batch(make_batch(rows, 1, merging=merging), ratio.mesh)
            values = to_host(ratio.compute({name: x[0] for name, x in arrays.items()}))
            for i, row in zip(order[number * size :], values, strict=False):
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
    *models, _ = run(weights, config, batch, copies=2, interventions=Interventions(adapter=factors))
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
    digest = hashlib.sha256(RATIOS_FILE.encode())  # Earlier versions stored them in another form.
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
