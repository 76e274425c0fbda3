"""Whose weights these are: what a fingerprint depends on, and that nothing is read twice for it."""

import collections
import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import EVEN_SIZES, TINY_GEMMA, UNIT_SIZE, error_of, user_error, with_random_units
from helpers.gguf_files import write_gguf
from helpers.models import random_adapter
from safetensors.numpy import load_file, save_file

from imae_jax.config import AntiExpertConfig, LlamaConfig
from imae_jax.convert import identity, load_model
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.convert.references import fingerprint
from imae_jax.decode.methods import parse_method
from imae_jax.sharding import make_mesh

FILE = "model.safetensors"


@pytest.fixture
def base(tiny, tmp_path):
    return shutil.copytree(tiny(**EVEN_SIZES).directory, tmp_path / "base")


@pytest.fixture
def imae(base, tmp_path):
    """An IMAE directory of that base."""
    lm, path = load_model(str(base)), tmp_path / "imae"
    weights = with_random_units(lm.model.weights(), lm.config)
    reference = dataclasses.asdict(lm.base)
    write_imae_dir(path, weights, lm.config, AntiExpertConfig(UNIT_SIZE), base=reference, training={})
    return path


def edit(directory, change):
    tensors = load_file(directory / FILE)
    change(tensors)
    save_file(tensors, directory / FILE, {"format": "pt"})


def merge_into_one_matrix(tensors):
    """A low-rank change of a matrix in the middle of the file."""
    name = "model.layers.1.mlp.down_proj.weight"
    random = np.random.default_rng(0)
    outputs, inputs = tensors[name].shape
    tensors[name] = tensors[name] + np.outer(random.normal(size=outputs), random.normal(size=inputs)).astype(
        np.float32
    )


def flip_a_bit(tensors):
    tensors["model.layers.2.self_attn.k_proj.weight"].view(np.uint32)[5, 7] ^= 1


def swap_two_names(tensors):
    up, gate = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "gate"))
    tensors[up], tensors[gate] = tensors[gate], tensors[up]


def change_a_type(tensors):
    name = "model.norm.weight"
    tensors[name] = tensors[name].astype(np.float16)


@pytest.mark.parametrize("change", [merge_into_one_matrix, flip_a_bit, swap_two_names, change_a_type])
def test_other_tensors_have_another_fingerprint(base, imae, change):
    before = fingerprint(str(base))
    edit(base, change)
    assert fingerprint(str(base)) != before
    assert load_model(str(base)).base.fingerprint == fingerprint(str(base))
    with user_error(imae, base, "trained on other weights", "--base"):
        load_model(str(imae))


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"rms_norm_eps": 1e-2}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}, False),
        ({"max_position_embeddings": 32}, False),
        ({"initializer_range": 0.5}, True),
        ({"eos_token_id": 9, "use_cache": False, "mlp_bias": False}, True),
    ],
    ids=str,
)
def test_the_config_counts_as_far_as_weights_are_computed_with_it(base, imae, tmp_path, change, is_same):
    other = shutil.copytree(base, tmp_path / "other")
    file = other / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert (fingerprint(str(base)) == fingerprint(str(other))) is is_same
    if is_same:
        load_model(str(imae), base=str(other))
    else:
        with user_error(imae, other, "another config", "--base"):
            load_model(str(imae), base=str(other))


def test_a_new_field_of_the_config_changes_no_digest():
    @dataclasses.dataclass(frozen=True)
    class Config(LlamaConfig):
        new: bool = False

    fields = {name: getattr(TINY_GEMMA, name) for name in (f.name for f in dataclasses.fields(LlamaConfig))}
    assert identity.config_line(Config(**fields)) == identity.config_line(TINY_GEMMA)
    assert identity.config_line(Config(**fields, new=True)) != identity.config_line(TINY_GEMMA)


@pytest.mark.parametrize("change", [1.0, 2.0])
def test_a_gguf_files_table_of_frequencies_counts(tiny, tmp_path, change):
    hf = copy.deepcopy(tiny("rope_llama3").hf)
    before, after = (tmp_path / f"{name}.gguf" for name in ("before", "after"))
    write_gguf(before, hf, {})
    hf.model.rotary_emb.inv_freq[1] /= change
    write_gguf(after, hf, {})
    first, second = (fingerprint(str(path)) for path in (before, after))
    assert (first == second) is (change == 1.0)


def split_over_files(directory):
    """Three files, and names in another order."""
    tensors = load_file(directory / FILE)
    (directory / FILE).unlink()
    weight_map = {}
    for i, name in enumerate(sorted(tensors, reverse=True)):
        weight_map[name] = f"model-0000{i % 3 + 1}-of-00003.safetensors"
    for file in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name, in_file in weight_map.items() if in_file == file}, directory / file
        )
    (directory / f"{FILE}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def add_what_nobody_reads(directory):
    save_file({"v_head.weight": np.ones((2, 2), np.float32)}, directory / "value_head.safetensors")
    edit(directory, lambda tensors: tensors.update({"rotary_emb.inv_freq": np.ones(3, np.float32)}))
    (directory / "notes.txt").write_text("mine")


@pytest.mark.parametrize("change", [split_over_files, add_what_nobody_reads])
def test_the_same_tensors_have_the_same_fingerprint(base, imae, change):
    before = load_model(str(base)).base.fingerprint
    change(base)
    assert load_model(str(base)).base.fingerprint == fingerprint(str(base)) == before
    assert load_model(str(imae)).base.fingerprint == before


def test_only_layers_that_are_read_count(base):
    before = {layers: fingerprint(f"{base}#layers={layers}") for layers in (1, 2, 3)}
    assert len({*before.values(), fingerprint(str(base))}) == 3
    edit(base, flip_a_bit)  # in the third layer
    after = {layers: fingerprint(f"{base}#layers={layers}") for layers in (1, 2, 3)}
    assert [before[layers] == after[layers] for layers in (1, 2, 3)] == [True, True, False]


def test_units_have_a_fingerprint_of_their_own(imae):
    before = load_model(str(imae)).units_fingerprint
    file = imae / "anti_expert.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.anti_expert.up_proj.weight"
    tensors[name] = tensors[name] + np.float32(1)
    save_file(tensors, file)
    lm = load_model(str(imae))
    assert lm.units_fingerprint != before
    assert load_model(lm.base.reference).units_fingerprint is None


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_every_tensor_is_read_once_and_hashed_on_the_way(imae, base, monkeypatch, stacked, sizes):
    """On a mesh, too, where a tensor's parts go to several devices."""
    read = collections.Counter()
    blocks = identity.TensorFiles.blocks

    def counting(source, name):
        read[name] += 1
        return blocks(source, name)

    monkeypatch.setattr(identity.TensorFiles, "blocks", counting)
    mesh = None if sizes is None or jax.device_count() != 8 else make_mesh(**sizes)
    lm = load_model(str(imae), stacked=stacked, mesh=mesh)
    assert read.keys() == load_file(base / FILE).keys() | load_file(imae / "anti_expert.safetensors").keys()
    assert {*read.values()} == {1}
    monkeypatch.undo()
    assert lm.base.fingerprint == fingerprint(str(base))


def test_a_record_of_an_older_version_is_told_apart(imae, base, caplog):
    """Its units load with a warning that says what to write to have them checked."""
    file = imae / "imae_config.json"
    settings = json.loads(file.read_text())
    right = settings["base"]["fingerprint"]
    settings["base"]["fingerprint"] = "5f" * 32
    file.write_text(json.dumps(settings))
    assert load_model(str(imae)).base.fingerprint == right
    (record,) = caplog.records
    for part in (imae, base, right, file.name):
        assert str(part) in record.getMessage()
    settings["base"]["fingerprint"] = right
    file.write_text(json.dumps(settings))
    caplog.clear()
    load_model(str(imae))
    assert not caplog.records


def test_exports_refuse_units_of_another_base(imae, base, tmp_path, capfd):
    from imae_jax.convert.__main__ import main

    edit(base, merge_into_one_matrix)
    command = ["export", "--model", imae, "--out", tmp_path / "out"]
    assert "trained on other weights" in error_of(capfd, main, *command)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_of_its_own_is_loaded(tiny, tmp_path):
    """As transformers 5 does; one that repeats the embeddings is not there twice."""
    checkpoint = tiny("tied")
    directory = shutil.copytree(checkpoint.directory, tmp_path / "model")
    before = fingerprint(str(directory))

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit(directory, repeat)
    lm = load_model(str(directory))
    assert lm.config.tie_word_embeddings
    assert lm.base.fingerprint == before

    def train(tensors):
        tensors["lm_head.weight"][3, 4] += 0.5

    edit(directory, train)
    lm = load_model(str(directory))
    assert not lm.config.tie_word_embeddings
    assert lm.base.fingerprint != before
    tensors = load_file(directory / FILE)
    np.testing.assert_array_equal(lm.model.weights().base["unembed"], tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(lm.model.weights().base["embed"], tensors["model.embed_tokens.weight"])


def test_what_a_method_has_loaded_is_what_a_run_records(tiny, imae, base, tmp_path):
    """A second model's fingerprint; an adapter's, which is the same whether or not its base is the model."""
    lm, other = load_model(str(base)), tiny("gqa", seed=5, **EVEN_SIZES).directory
    adapter = random_adapter(tmp_path / "adapter", lm.config, lm.base.reference)
    for method, reference in (
        (parse_method(f"cd:amateur={other}"), other),
        (parse_method(f"icd:anti_expert={adapter}"), adapter),
    ):
        lm.prepare(method, generating=False)
        assert lm.resource_fingerprint(method) == fingerprint(str(reference))
    assert load_model(str(adapter)).base.fingerprint == fingerprint(str(adapter))
    assert lm.resource_fingerprint(parse_method("base")) is None
    with user_error("cd: amateur=", imae, "units", base):
        lm.prepare(f"cd:amateur={imae}", generating=False)
