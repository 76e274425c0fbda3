"""The memory that a run needs on each device, without allocating it.

What is exact and what is estimated:

- Weights, trainable part, Adam's moments, gradients and batches follow from shapes and shardings: exact.
- Activations are the compiler's own figure for the temporary memory of the very train step, less the
  gradients. They hold whatever lives within a step only: what the backward pass keeps, gathered weights,
  logits, copies. `--device` asks the compiler of that device, where it is installed (`imae_jax.targets`):
  exact, for this program and this version of XLA. Otherwise the step is compiled for as many virtual CPU
  devices as the mesh has: an estimate.

The CPU compiler has no bfloat16 arithmetic: it keeps float32 copies of activations and of whole stacks of
weights, nearly three times what Llama-3.1-70B needs. float16, of the same width, it stores as it is, so
bfloat16 steps are compiled in float16. Matrices that a matmul reads are still widened, though one at a time,
and fewer operations are merged than on a TPU, so that the figure errs high there: 1.05 to 2.1 times what
XLA's compiler for TPU v5p needs (a model of 8 layers, Llama-2-7B, Llama-3.1-70B; above 1.35 only with
remat=full, where activations are few). attention=flash is counted as plain attention, with its [T, T] scores.
`--here` asks the compiler of this machine's own devices instead.

Not in the plan: what the runtime takes for itself; evaluation and the token filter, whose forward passes need
less than the step (but a separate `filter.anti_expert_llm` brings its weights); host memory.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.errors import JaxRuntimeError

from imae_jax.config import LlamaConfig
from imae_jax.convert.references import DTYPES, model_config
from imae_jax.errors import UserError
from imae_jax.llama import Llama, Weights
from imae_jax.lora import side_by_side
from imae_jax.sharding import check_divisible, row_shards, sharding, shardings_of
from imae_jax.targets import TARGETS
from imae_jax.train import data
from imae_jax.train.config import IcdConfig, TrainConfig
from imae_jax.train.objectives import Objective
from imae_jax.train.run_directory import ADAPTER_STAGES
from imae_jax.train.setup import adapter_objective, units_objective
from imae_jax.train.step import make_optimizer, state_shardings
from imae_jax.train.trainer import Trainer

GIB = 2**30
# The share of a GPU's memory that JAX takes unless told otherwise.
GPU_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """What a stage holds at its peak, in bytes per device.

    Attributes:
        name: `icd`, `icd_right` or `units`.
        base: frozen weights; in `icd` with `icd.model` those of both models, in `units` of objective `pairs`
            the adapters, too.
        trainable: the float32 weights that are trained.
        optimizer: Adam's moments and counters.
        batch: one step's rows; the next one's are placed while it runs, hence twice.
        gradients: gradients of the trainable part, float32.
        activations: all else that lives within a step; an estimate, see the module.
    """

    name: str
    base: int
    trainable: int
    optimizer: int
    batch: int
    gradients: int
    activations: int

    @property
    def temporaries(self) -> int:
        """Gradients and activations: what the compiler calls the step's temporary memory."""
        return self.gradients + self.activations

    @property
    def total(self) -> int:
        return self.base + self.trainable + self.optimizer + self.batch + self.temporaries


def plan(config: TrainConfig, mesh: jax.sharding.Mesh) -> list[StagePlan]:
    """Plans the stages that a run of this config goes through; compiles a step each, allocates nothing.

    A batch has rows of `data.max_length` tokens of which all but the first are in T_fact: the worst case.
    Adapters that are given are counted as if stage 1 made them.

    Args:
        config: settings of the run.
        mesh: its devices, of any kind; on CPU devices bfloat16 is counted as the module describes.

    Raises:
        UserError: the model is unknown, or the mesh does not divide its widths.
    """
    llama, base = _abstract_base(config.model, config.revision, config.dtype, mesh)
    units = units_objective(config, llama)
    check_divisible(llama, units.anti_expert, mesh.shape)
    stages = []
    icd = adapter_objective(config, "wrong")
    to_train = config.adapters_to_train()
    if to_train:
        icd_llama, icd_base, beside = llama, base, 0
        if config.icd.model is not None:
            icd_llama, icd_base = _abstract_base(config.icd.model, None, config.dtype, mesh)
            check_divisible(icd_llama, None, mesh.shape)
            beside = _bytes(base)
        stage = _plan_stage("icd", config, config.icd, icd_llama, Weights(icd_base), icd, mesh)
        stages += [
            dataclasses.replace(stage, name=ADAPTER_STAGES[answers], base=stage.base + beside)
            for answers in to_train
        ]
    frozen = Weights(base)
    if config.objective == "pairs":
        placed = state_shardings(llama, icd, make_optimizer(config.icd.optimizer), mesh).trainable
        module = nnx.eval_shape(lambda: icd.module(llama, 0))
        deltas = jax.tree.map(_abstract, nnx.to_pure_dict(nnx.state(module)), placed)
        both = jax.eval_shape(side_by_side, [(deltas, icd.lora.scale)] * 2)
        frozen = Weights(base, lora=jax.tree.map(_abstract, both, placed))
    stages.append(_plan_stage("units", config, config, llama, frozen, units, mesh))
    return stages


def _plan_stage(
    name: str,
    config: TrainConfig,
    stage: TrainConfig | IcdConfig,
    llama: LlamaConfig,
    frozen: Weights,
    objective: Objective,
    mesh: jax.sharding.Mesh,
) -> StagePlan:
    trainer = Trainer(llama, objective, stage.optimizer, mesh, config.seed)
    state = jax.tree.map(_abstract, trainer.state_shape(), trainer.shardings)
    # A model that knows shorter rows only is given no longer ones.
    length = min(config.data.max_length, llama.context_length)
    longest = data.Example(0, (0,) * length, 1, (True,) * (length - 1))
    # Rows of the greatest length are not merged: see `data.Merging`.
    rows = data.make_batch([longest] * stage.batch_size * len(objective.answers), stage.accumulation)
    placement = sharding(mesh, *data.Batch.AXES)
    batch = {key: _abstract(array, placement) for key, array in rows.arrays().items()}

    # float16 stands in for bfloat16 on CPU devices: see the module.
    swap = _on_cpu(mesh) and frozen.dtype == jnp.bfloat16
    base = jax.tree.map(lambda x: x.update(dtype=jnp.float16), frozen.base) if swap else frozen.base
    lowered = trainer.train_step.lower(state, dataclasses.replace(frozen, base=base), batch)
    temporaries = _temporaries(lowered, mesh)
    gradients = _bytes(state.trainable)
    return StagePlan(
        name=name,
        base=_bytes(frozen.base) + _bytes(frozen.lora),
        trainable=_bytes(state.trainable),
        optimizer=_bytes(state.opt_state),
        batch=2 * _bytes(batch),
        gradients=gradients,
        activations=max(0, temporaries - gradients),
    )


def _temporaries(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> int:
    """Bytes of a program's temporary memory on one device, by its compiler."""
    # A program that is not run needs no optimized machine code, and its memory does not depend on it.
    options = {"xla_backend_optimization_level": 0} if _on_cpu(mesh) else None
    try:
        return lowered.compile(options).memory_analysis().temp_size_in_bytes
    except JaxRuntimeError as error:
        # The TPU's refuses what the device could not hold, and says how much that is.
        needed = re.search(r"required for HLO temporaries \(([\d.]+)G\)", str(error))
        if needed is None:
            raise
        return int(float(needed[1]) * GIB)


def _abstract_base(
    reference: str, revision: str | None, dtype: str | None, mesh: jax.sharding.Mesh
) -> tuple[LlamaConfig, Any]:
    """A base's config, and its stacked weights as shapes with shardings."""
    llama, stored = model_config(reference, revision)
    dtype = dtype or stored
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} does not exist: use one of {', '.join(DTYPES)}")
    model = nnx.eval_shape(lambda: Llama(llama, rngs=nnx.Rngs(0), dtype=DTYPES[dtype]))
    state = nnx.state(model, nnx.Param)
    placed = nnx.to_pure_dict(shardings_of(state, mesh))
    return llama, jax.tree.map(_abstract, model.weights().base, placed)


def _abstract(x: Any, placement: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement)


def _on_cpu(mesh: jax.sharding.Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _bytes(tree: Any) -> int:
    """What a tree of abstract arrays takes on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def plan_table(stages: Sequence[StagePlan]) -> Any:
    """A rich table of the parts of each stage, in GiB."""
    from rich.table import Table

    table = Table(title="memory of one device, GiB")
    table.add_column("")
    for stage in stages:
        table.add_column(stage.name, justify="right")
    rows = {
        "base, frozen": "base",
        "trainable, float32": "trainable",
        "Adam's moments": "optimizer",
        "gradients": "gradients",
        "activations and other temporaries": "activations",
        "batches": "batch",
        "total": "total",
    }
    for label, field in rows.items():
        if field == "total":
            table.add_section()
        table.add_row(label, *(f"{getattr(stage, field) / GIB:.2f}" for stage in stages))
    return table


def advice(config: TrainConfig, stage: StagePlan, mesh: jax.sharding.Mesh) -> list[str]:
    """Settings that would make a stage smaller and are not at their end yet, the cheapest first."""
    prefix, settings = ("icd.", config.icd) if stage.name in ADAPTER_STAGES.values() else ("", config)
    micro = settings.batch_size // settings.accumulation
    shards = row_shards(mesh)
    ways = []
    if config.dtype == "float32":
        ways.append("dtype=bfloat16")
    if config.remat != "full":
        ways.append("remat=full")
    if micro > shards:
        # The least larger divisor that leaves every device as many rows.
        more = next(
            n
            for n in range(settings.accumulation + 1, settings.batch_size + 1)
            if settings.batch_size % n == 0 and settings.batch_size // n % shards == 0
        )
        ways.append(f"{prefix}accumulation={more}")
    ways.append(f"mesh.fsdp={2 * mesh.shape['fsdp']} on twice as many devices")
    return ways


def verdict(
    config: TrainConfig, largest: StagePlan, mesh: jax.sharding.Mesh, device: str, capacity: float
) -> str:
    """One line: whether the largest stage fits into `capacity` bytes, and what to change."""
    used = f"{largest.total / GIB:.1f} of {capacity / GIB:.1f} GiB (stage {largest.name})"
    if largest.total > capacity:
        return f"does not fit: {used}; try {', '.join(advice(config, largest, mesh))}"
    hint = ""
    if device in TARGETS and TARGETS[device].gpu and largest.total > GPU_SHARE * capacity:
        hint = "; JAX takes 75 % of a GPU: set XLA_PYTHON_CLIENT_MEM_FRACTION=.95"
    return f"fits: {used}{hint}"
