"""Training settings: a typed dataclass filled from YAML and `key=value` overrides."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from imae_jax.config import LoraConfig
from imae_jax.errors import UserError, first_line
from imae_jax.llama import ATTENTION_KINDS, REMAT_POLICIES
from imae_jax.losses import LossConfig
from imae_jax.prompts import FORMATS
from imae_jax.train.objectives import UNITS_OBJECTIVES

CONFIG_DIRECTORY = Path(__file__).parent / "configs"


@dataclasses.dataclass
class ColumnsConfig:
    """Names of a data source's columns; the defaults are HaluEval QA's fields."""

    question: str = "question"
    right: str = "right_answer"
    wrong: str = "hallucinated_answer"


@dataclasses.dataclass
class DataConfig:
    """Where the questions come from and how they become tokens.

    Attributes:
        source: `demo` or `pairs` (shipped with the package: 255 questions, and 600),
            `halueval`, a JSONL, JSON or CSV file, or a data set's id on the hub (`owner/name`).
        path: the local JSONL file of `halueval`; without it the hub is asked.
        columns: where the source has the question, its right and its wrong answer.
        hub_name, hub_split: which configuration and split of a data set on the hub.
        format: `chat` (the model's chat template), `plain` (`Q: …\\nA: …`), or `auto`: chat where the
            tokenizer has a template.
        max_length: rows with more tokens, in either answer, are skipped and counted.
        limit: use the first rows only.
        held_out: how many rows are never trained on but measured (all rows of a question or none).
        split_seed: draws them; not the run's seed, so that runs can be compared.
        length_ratio: use only rows whose right and hallucinated answers differ in tokens by at most
            this factor. HaluEval's hallucinated answers are much longer than its right ones, and an
            anti-expert can learn "write long" instead of "write wrong".
        group_by_length: draw batches of rows of like length. Less padding, more steps a second; the order of
            rows is another one.
    """

    source: str = "demo"
    path: str | None = None
    columns: ColumnsConfig = dataclasses.field(default_factory=ColumnsConfig)
    hub_name: str | None = None
    hub_split: str = "train"
    format: str = "auto"
    max_length: int = 512
    limit: int | None = None
    held_out: int = 0
    split_seed: int = 0
    length_ratio: float | None = None
    group_by_length: bool = False


@dataclasses.dataclass
class UnitConfig:
    """Size of the anti-expert units.

    Attributes:
        ratio: A / F; the paper's is 4096 / 11008.
        intermediate_size: A itself, instead of the ratio.
        first_layer: units of layers below (counted from 0) are not trained and contribute nothing.
    """

    ratio: float = 4096 / 11008
    intermediate_size: int | None = None
    first_layer: int = 0


@dataclasses.dataclass
class TokenFilterConfig:
    """Which answer tokens are about facts (IMAE, section 3.2).

    Attributes:
        anti_expert_llm: with objective `paper`, model reference of a separate LLM trained on hallucinated
            answers; a LoRA adapter in PEFT's format is one. Without it, the one that the `icd` stage makes;
            without that stage, T_fact holds every answer token.
        gamma: γ, the least log-probability ratio of anti-expert LLM to base; with objective `pairs` the least
            absolute ratio of the two adapters: 0 keeps every answer token, without a stage 2.
        reuse: `token_filter` directory of another run with the same rows, base and anti-expert LLM, whose
            log-ratios are taken instead of computing them.
    """

    anti_expert_llm: str | None = None
    gamma: float = 1.0
    reuse: str | None = None


@dataclasses.dataclass
class AdaptersConfig:
    """LoRA adapters of the base in PEFT's format for objective `pairs`; stage 1 makes those not given.

    Attributes:
        right: directory of the one trained on right answers.
        wrong: directory of the one trained on wrong answers.
    """

    right: str | None = None
    wrong: str | None = None


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; the paper names none of its settings.

    Attributes:
        steps: optimizer steps in total.
        learning_rate: at its peak.
        warmup_steps: steps of linear growth from 0.
        final_ratio: learning rate at the end, as a share of the peak.
        weight_decay: decoupled.
        clip_norm: global norm to which gradients are clipped.
        beta1, beta2: of Adam.
    """

    steps: int = 200
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    final_ratio: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999


@dataclasses.dataclass
class IcdConfig:
    """The anti-expert LLM: LoRA on the hallucinated answers (ICD, Zhang et al., arXiv 2312.15710). Objective
    `pairs` trains both of its adapters with these settings.

    The defaults are that paper's: Adam, learning rate 5e-4, batch 256, 5 epochs; rank and alpha are ours.

    Attributes:
        enabled: with objective `paper`, train it before the units, for the token filter. `pairs` always
            trains the adapters that are not given, `preference` needs none.
        model: with objective `paper`, reference of another base to start from, with the same vocabulary; ICD
            takes the base LM where the model itself is a chat model.
        lora: the deltas.
        batch_size: rows per optimizer step.
        accumulation: micro-batches that a step is cut into.
        epochs: passes over the data; None takes `optimizer.steps`.
        optimizer: its settings.
    """

    enabled: bool = False
    model: str | None = None
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    batch_size: int = 256
    accumulation: int = 1
    epochs: float | None = 5.0
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-4)
    )

    def steps(self, num_rows: int) -> int:
        """Optimizer steps over that many rows."""
        if self.epochs is None:
            return self.optimizer.steps
        return max(1, round(self.epochs * num_rows / self.batch_size))


@dataclasses.dataclass
class MeshConfig:
    """Devices along each mesh axis; `data` of -1 takes all that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


_ABOVE_ZERO, _FINITE = 1e-30, 3.4e38
_OPTIMIZER_BOUNDS = {
    "steps": (1, math.inf),
    "learning_rate": (_ABOVE_ZERO, _FINITE),
    "warmup_steps": (0, math.inf),
    "final_ratio": (0, 1),
    "weight_decay": (0, _FINITE),
    "clip_norm": (_ABOVE_ZERO, math.inf),
    "beta1": (0, 1 - 1e-9),
    "beta2": (0, 1 - 1e-9),
}
_BOUNDS: dict[str, tuple[float, float]] = {
    "batch_size": (1, math.inf),
    "accumulation": (1, math.inf),
    "seed": (0, 2**31 - 1),
    "save_every": (1, math.inf),
    "keep": (1, math.inf),
    "log_every": (1, math.inf),
    "data.max_length": (2, math.inf),
    "data.limit": (1, math.inf),
    "data.held_out": (0, math.inf),
    "data.split_seed": (0, 2**31 - 1),
    "eval_every": (1, math.inf),
    "eval_rows": (1, math.inf),
    "data.length_ratio": (1, math.inf),
    "units.ratio": (_ABOVE_ZERO, 1e3),
    "units.first_layer": (0, math.inf),
    "icd.batch_size": (1, math.inf),
    "icd.accumulation": (1, math.inf),
    "icd.epochs": (_ABOVE_ZERO, _FINITE),
    "filter.gamma": (-_FINITE, _FINITE),
    **{f"optimizer.{name}": limits for name, limits in _OPTIMIZER_BOUNDS.items()},
    **{f"icd.optimizer.{name}": limits for name, limits in _OPTIMIZER_BOUNDS.items()},
}
# Settings, or groups of them, that an objective does not use: a run warns of them. `TrainConfig` refuses
# those that name a model or a directory.
UNUSED = {
    "paper": ("loss.alpha", "loss.tau"),
    "pairs": ("loss.beta", "loss.tau"),
    "preference": ("icd", "filter", "loss.beta", "loss.alpha", "loss.valid_form", "loss.delta"),
}
# Settings that may change when a run is resumed: they do not alter what a step computes, but for the order in
# which devices and kernels add up.
FREE_ON_RESUME = {
    *("out", "mesh", "save_every", "keep", "log_every", "eval_every", "eval_rows", "wandb", "attention"),
}


@dataclasses.dataclass
class TrainConfig:
    """Everything that determines a training run.

    Attributes:
        model: reference of the base, see `imae_jax.convert.references`.
        out: output directory.
        objective: what the units are trained for: `paper` (IMAE's losses on hallucinated answers), `pairs`
            (the contrast of two adapters on both answers) or `preference` (DPO whose sign is the mode).
        batch_size: questions per optimizer step; each is used in both modes, and with objectives `pairs` and
            `preference` it is two rows, one an answer.
        accumulation: micro-batches that a step is cut into; the result is the same.
        revision, tokenizer: which ones of the model, see `load_model`.
        dtype: dtype of the frozen base and of all activations; None keeps the checkpoint's. The units and
            their optimizer state are float32 throughout.
        remat: what a layer's backward pass keeps: none, dots, narrow or full (see `llama.Options`).
        attention: plain, or flash, which never builds the [T, T] scores on GPUs and TPUs.
        seed: draws the units' initial weights and the order of rows.
        save_every: steps between checkpoints.
        keep: checkpoints to keep.
        log_every: steps between lines of metrics.jsonl.
        eval_every: steps between measurements on held-out rows; there is one before the first step and one
            after the last, too. None measures nothing.
        eval_rows: how many held-out rows are measured before the last step; None measures all.
        wandb: Weights & Biases project to log to; None logs to TensorBoard and metrics.jsonl only.
    """

    model: str = MISSING
    out: str = MISSING
    objective: str = "paper"
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    units: UnitConfig = dataclasses.field(default_factory=UnitConfig)
    icd: IcdConfig = dataclasses.field(default_factory=IcdConfig)
    filter: TokenFilterConfig = dataclasses.field(default_factory=TokenFilterConfig)
    adapters: AdaptersConfig = dataclasses.field(default_factory=AdaptersConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    batch_size: int = 24
    accumulation: int = 1
    revision: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    remat: str = "none"
    attention: str = "plain"
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    log_every: int = 1
    eval_every: int | None = 100
    eval_rows: int | None = 64
    wandb: str | None = None

    def __post_init__(self):
        for name, (low, high) in _BOUNDS.items():
            value = self
            for key in name.split("."):
                value = getattr(value, key)
            if value is not None and not low <= value <= high:
                limit = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
                raise UserError(f"{name}={value} must be {limit}")
        for prefix, stage in (("", self), ("icd.", self.icd)):
            if stage.batch_size % stage.accumulation:
                raise UserError(
                    f"{prefix}accumulation={stage.accumulation} does not divide "
                    f"{prefix}batch_size={stage.batch_size}"
                )
        if self.objective not in UNITS_OBJECTIVES:
            raise UserError(f"objective={self.objective!r}: use one of {', '.join(UNITS_OBJECTIVES)}")
        # What would be left unused without a word.
        given = {
            "filter.anti_expert_llm": (self.filter.anti_expert_llm, ("paper",)),
            "filter.reuse": (self.filter.reuse, ("paper", "pairs")),
            "icd.model": (self.icd.model, ("paper",)),
            "adapters.right": (self.adapters.right, ("pairs",)),
            "adapters.wrong": (self.adapters.wrong, ("pairs",)),
        }
        if self.filter.reuse is not None and self.filter_keeps_all:
            raise UserError(f"filter.reuse has no use with filter.gamma={self.filter.gamma}, which keeps all")
        for name, (value, objectives) in given.items():
            if value is not None and self.objective not in objectives:
                only = " or ".join(objectives)
                raise UserError(f"{name} goes with objective={only}, not with {self.objective}")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat={self.remat!r}: use one of {', '.join(REMAT_POLICIES)}")
        if self.attention not in ATTENTION_KINDS:
            raise UserError(f"attention={self.attention!r}: use one of {', '.join(ATTENTION_KINDS)}")
        if self.data.format not in FORMATS:
            raise UserError(f"data.format={self.data.format!r}: use one of {', '.join(FORMATS)}")

    @property
    def filter_keeps_all(self) -> bool:
        """Whether γ is such that every answer token is in T_fact: no absolute ratio is below 0."""
        return self.objective == "pairs" and self.filter.gamma <= 0

    def adapters_to_train(self, *, only_icd: bool = False) -> list[str]:
        """Which answers stage 1 trains an adapter on: `wrong`, `right`.

        Args:
            only_icd: the run stops after stage 1.

        Raises:
            UserError: it would have nothing to do.
        """
        if self.objective == "paper":
            return ["wrong"] if only_icd or self.icd.enabled else []
        given = dataclasses.asdict(self.adapters)
        names = [n for n in ("wrong", "right") if given[n] is None] if self.objective == "pairs" else []
        if only_icd and not names:
            raise UserError(f"stage icd has nothing to train with objective={self.objective} as it is set")
        return names

    def unused(self) -> list[str]:
        """Settings that differ from their defaults and that the objective does not use."""
        settings, defaults = (_flat(config.to_dict()) for config in (self, TrainConfig("", "")))
        groups = UNUSED[self.objective]
        return [
            name
            for name, value in settings.items()
            if value != defaults[name] and any(f"{name}.".startswith(f"{group}.") for group in groups)
        ]

    def to_dict(self) -> dict[str, Any]:
        """As a YAML file holds it: nested dicts, lists and plain values."""
        return OmegaConf.to_container(OmegaConf.structured(self))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def check_resumed(config: TrainConfig, saved: dict[str, Any], out: Path, *, units_begun: bool) -> None:
    """Refuses to resume a run with settings that change what its steps compute.

    Args:
        config: settings of the resumed run.
        saved: settings of the run in `out`.
        out: names it in the error.
        units_begun: whether a checkpoint of the units exists. γ only thresholds: before, it may change.
    """
    # A setting that a later version added was at its default.
    saved = OmegaConf.to_container(OmegaConf.merge(TrainConfig("", "").to_dict(), saved))
    now = config.to_dict()
    if not units_begun and isinstance(saved.get("filter"), dict):
        saved["filter"] |= {"gamma": now["filter"]["gamma"]}
    changed = [key for key in now if key not in FREE_ON_RESUME and now[key] != saved.get(key)]
    if changed:
        raise UserError(
            f"{', '.join(changed)} differ(s) from the run in {out}: resume with its settings, or start over "
            "with another out"
        )


def load_config(file: str | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies `key=value` overrides (`optimizer.steps=50`).

    Args:
        file: path of a YAML file, or the name of one that is shipped (`demo`); None starts from the
            defaults. Its key `extends` names another, whose settings hold where it has none.
        overrides: with dotted keys; later ones win.

    Raises:
        UserError: names the key or value that is wrong.
    """
    try:
        layers = [OmegaConf.structured(TrainConfig(model="", out=""))]
        layers[0].model, layers[0].out = MISSING, MISSING
        if file is not None:
            layers += _read(file)
        for override in overrides:
            if "=" not in override:
                raise UserError(f"{override!r} is not of the form key=value")
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        merged = OmegaConf.merge(*layers)
        for name in sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{name} is not set: pass {name}=… or put it into the config file")
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0]
        key = getattr(error, "full_key", None)
        raise UserError(f"config{f' key {key}' if key else ''}: {reason}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file or 'an override'} is not valid YAML: {first_line(error)}") from error


def _read(file: str, extended_by: str | None = None) -> list[DictConfig]:
    """The settings of a file, after those of the file that it extends."""
    loaded = OmegaConf.load(_find(file))
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{file} must hold settings as `key: value`")
    extends = loaded.pop("extends", None)
    if extends is None:
        return [loaded]
    if extended_by is not None:
        raise UserError(f"{extended_by} extends {file}, which extends another: name one that does not")
    return [*_read(str(extends), extended_by=file), loaded]


def _find(file: str) -> Path:
    if Path(file).is_file():
        return Path(file)
    shipped = CONFIG_DIRECTORY / f"{file}.yaml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(path.stem for path in CONFIG_DIRECTORY.glob("*.yaml")))
    raise UserError(f"config file {file} does not exist: give a path, or a shipped one ({names})")
