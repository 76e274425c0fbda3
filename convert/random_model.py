"""Models with random weights, or of none but their shapes, for measurements: nothing but sizes is read."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from imae_jax import layer_stack
from imae_jax.config import AntiExpertConfig, LoraConfig
from imae_jax.convert.references import check_same_vocabulary, model_config, parse_dtype
from imae_jax.decode.methods import Resource
from imae_jax.errors import UserError
from imae_jax.language_model import BaseReference, LanguageModel, LoadedResource
from imae_jax.llama import Llama
from imae_jax.lora import LoraDeltas
from imae_jax.sharding import check_divisible, model_mesh, shardings_of

# Draws an adapter where a method names a trained one of the model.
RANDOM_ADAPTER = "adapter"


def random_model(
    reference: str,
    *,
    dtype: str | None,
    units: bool,
    mesh: jax.sharding.Mesh | str | None = None,
) -> LanguageModel:
    """A model with random weights of another's sizes, without a tokenizer.

    What methods name besides is drawn, too: any directions, `adapter` for each LoRA adapter of rank 16, and a
    model of any reference's sizes.

    Args:
        reference: reference of the sizes, see `convert.references.model_config`; published sizes need no
            network.
        dtype: dtype of the base; default: the checkpoint's own.
        units: whether to add anti-expert units of the paper's ratio.
        mesh: devices, as for `load_model`.
    """

    def drawn(declare: Callable[[], Any], mesh: jax.sharding.Mesh | None) -> Any:
        """A module with random weights, each drawn straight into its shards."""
        if mesh is None:
            return declare()
        graphdef, abstract = nnx.split(nnx.eval_shape(declare))
        draw = jax.jit(lambda: nnx.split(declare())[1], out_shardings=shardings_of(abstract, mesh))
        return nnx.merge(graphdef, draw())

    return _model(reference, dtype, units, mesh, drawn)


def abstract_model(
    reference: str,
    *,
    dtype: str | None,
    units: bool,
    devices: Sequence[jax.Device],
    mesh: jax.sharding.Mesh | None = None,
) -> LanguageModel:
    """As `random_model`, with shapes instead of arrays, on devices that need not be there, to compile for.

    Args:
        devices: one; or those of the mesh.
    """
    one = jax.sharding.SingleDeviceSharding(devices[0])

    def described(declare: Callable[[], Any], mesh: jax.sharding.Mesh | None) -> Any:
        graphdef, abstract = nnx.split(nnx.eval_shape(declare))
        shapes, structure = jax.tree.flatten(abstract)
        placed = [one] * len(shapes) if mesh is None else jax.tree.leaves(shardings_of(abstract, mesh))
        shapes = [x.update(sharding=placement) for x, placement in zip(shapes, placed, strict=True)]
        return nnx.merge(graphdef, jax.tree.unflatten(structure, shapes))

    return _model(reference, dtype, units, mesh, described)


Make = Callable[[Callable[[], Any], jax.sharding.Mesh | None], Any]
"""Makes a module, from what declares it, on a mesh or one device."""


def _model(
    reference: str, dtype: str | None, units: bool, mesh: jax.sharding.Mesh | str | None, make: Make
) -> LanguageModel:
    config, own_dtype = model_config(reference)
    dtype = dtype or own_dtype
    array_dtype = parse_dtype(dtype)
    anti_expert = AntiExpertConfig.scaled_to(config) if units else None
    mesh = model_mesh(mesh, config, anti_expert)
    if mesh is not None:
        check_divisible(config, anti_expert, mesh.shape)
    model = make(lambda: Llama(config, anti_expert, rngs=nnx.Rngs(0), stacked=False, dtype=array_dtype), mesh)
    base = BaseReference(reference, None, "random weights", dtype)
    return LanguageModel(model, None, (), base, load_resource=functools.partial(_resource, make))


def _resource(make: Make, lm: LanguageModel, resource: Resource) -> LoadedResource:
    config = lm.config
    if resource.kind == "units":  # Of one size, as the model's own.
        return LoadedResource()
    if resource.kind == "directions":
        shape = (config.num_layers, config.num_heads, config.head_dim)
        shifts = tuple(jax.random.normal(jax.random.key(0), shape))
        return LoadedResource(weights=lambda method: {"shifts": shifts})
    if resource.kind == "vectors":
        vectors = tuple(jax.random.normal(jax.random.key(0), (config.num_layers, config.hidden_size)))
        return LoadedResource(weights=lambda method: {"vectors": vectors})
    if resource.kind in ("adapters", "anti_expert_llm") and set(_names(resource)) == {RANDOM_ADAPTER}:
        count = len(_names(resource))  # Side by side.
        lora = LoraConfig(rank=count * LoraConfig.rank, alpha=count * LoraConfig.alpha)

        def declare():
            rngs = nnx.Rngs(0)
            return layer_stack.declare(
                lambda n: LoraDeltas(config, lora, rngs=rngs, stack=n), config.num_layers, stacked=False
            )

        deltas = layer_stack.arrays(make(declare, lm.mesh))
        return LoadedResource(weights=lambda method: {"lora": deltas, "lora_scale": lora.scale})
    if resource.kind == "adapters":
        raise UserError(f"adapters of random weights are drawn, too: give {RANDOM_ADAPTER} for each")
    second = _model(resource.reference, lm.base.dtype, False, lm.mesh, make)
    check_same_vocabulary(lm, second)
    return LoadedResource(second=second)


def _names(resource: Resource) -> tuple[str, ...]:
    return resource.reference if isinstance(resource.reference, tuple) else (resource.reference,)
