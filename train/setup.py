"""What settings mean for a base: the mesh, and what each stage trains."""

import dataclasses
from collections.abc import Sequence

import jax

from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.errors import UserError
from imae_jax.sharding import make_mesh, row_shards
from imae_jax.train.config import TrainConfig
from imae_jax.train.objectives import UNITS_OBJECTIVES, AnswerObjective, UnitsObjective

ADAPTER_MODES = {"wrong": "anti_expert_llm", "right": "right_llm"}
"""What an adapted model is called where it is measured, by the answers that it is trained on."""


def run_mesh(
    config: TrainConfig, with_icd: bool, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """The mesh of a config, over all devices or given ones; it divides the rows of every micro-batch."""
    sizes = config.mesh
    data_size = sizes.data
    if data_size == -1:
        number = jax.device_count() if devices is None else len(devices)
        data_size = max(1, number // max(1, sizes.fsdp * sizes.tensor))
    mesh = make_mesh(data_size, sizes.fsdp, sizes.tensor, devices)
    shards = row_shards(mesh)
    stages = [("", config)] + ([("icd.", config.icd)] if with_icd else [])
    for prefix, stage in stages:
        micro = stage.batch_size // stage.accumulation
        if micro % shards:
            raise UserError(
                f"{prefix}batch_size / {prefix}accumulation = {micro} rows cannot be spread over "
                f"data · fsdp = {shards} devices: choose a multiple of {shards}"
            )
    return mesh


def units_objective(config: TrainConfig, llama: LlamaConfig) -> UnitsObjective:
    """What the units of a base are trained for, with their sizes.

    Raises:
        UserError: `units.first_layer` names no layer of the base.
    """
    units = config.units
    if not units.first_layer < llama.num_layers:
        raise UserError(
            f"units.first_layer={units.first_layer} leaves no layer to train: the model has "
            f"{llama.num_layers}, counted from 0"
        )
    sizes = AntiExpertConfig.scaled_to(llama, units.ratio)
    if units.intermediate_size is not None:
        sizes = AntiExpertConfig(units.intermediate_size)
    keep = config.loss.keep
    if keep is None:
        keep = 0.0 if config.objective == "paper" else 1.0
    return UNITS_OBJECTIVES[config.objective](
        sizes, dataclasses.replace(config.loss, keep=keep), config.remat, config.attention, units.first_layer
    )


def adapter_objective(config: TrainConfig, answers: str) -> AnswerObjective:
    """What an adapter is trained for, on `wrong` or `right` answers."""
    return AnswerObjective(config.icd.lora, ADAPTER_MODES[answers], config.remat, config.attention)
