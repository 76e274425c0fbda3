"""The memory plan: against arrays and programs that exist, published sizes, and the command."""

import dataclasses
import functools
import json

import jax
import pytest
from conftest import TINY, error_of, run_python, user_error
from flax import nnx
from helpers.training import examples

from imae_jax.config import AntiExpertConfig, LoraConfig
from imae_jax.convert.references import PUBLISHED_SIZES, model_config
from imae_jax.llama import Llama, Weights
from imae_jax.sharding import make_mesh
from imae_jax.train import data
from imae_jax.train.__main__ import main
from imae_jax.train.config import TrainConfig, load_config
from imae_jax.train.objectives import AnswerObjective, ImaeObjective
from imae_jax.train.plan import GIB, StagePlan, advice, plan, verdict
from imae_jax.train.step import (
    init_state,
    make_optimizer,
    make_train_step,
    place_batch,
    state_shardings,
)

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 98}


def config_of(model, *settings: str) -> TrainConfig:
    base = ["out=unused", "batch_size=8", "data.max_length=20", "units.intermediate_size=24"]
    return load_config(None, [f"model={model}", *base, *settings])


@pytest.fixture
def only_config(tmp_path):
    """Writes a directory with a config.json and nothing else."""

    def write(**fields):
        (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf() | SIZES | fields))
        return tmp_path

    return write


def bytes_on_device(tree) -> int:
    device = jax.devices()[0]
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device]
    return sum(shard.data.nbytes for shard in shards)


def test_the_plan_is_what_a_run_holds_and_allocates_nothing(tiny):
    checkpoint = tiny("gqa", **SIZES)
    icd_settings = (f"icd.model={checkpoint.directory}", "icd.batch_size=16", "icd.accumulation=2")
    config = config_of(checkpoint.directory, "icd.enabled=true", *icd_settings)
    mesh = make_mesh(2, 2, 2)
    lm = checkpoint.load(stacked=True, mesh=mesh)
    base = lm.model.weights().base
    longest = dataclasses.replace(examples(1)[0], tokens=(5,) * 20, start=1, fact=(True,) * 19)
    icd = (AnswerObjective(LoraConfig()), config.icd)
    units = (ImaeObjective(AntiExpertConfig(24), config.loss), config)
    allocated = jax.live_arrays()  # held, so that none of them can be collected meanwhile
    stages = plan(config, mesh)
    assert len(jax.live_arrays()) == len(allocated)
    for planned, (objective, settings) in zip(stages, (icd, units), strict=True):
        optimizer = make_optimizer(settings.optimizer)
        shardings = state_shardings(lm.config, objective, optimizer, mesh)
        state = init_state(lm.config, objective, optimizer, shardings, seed=0)
        rows = data.make_batch([longest] * settings.batch_size, settings.accumulation)
        batch = place_batch(rows, mesh)
        step = make_train_step(lm.config, objective, optimizer, shardings, mesh)
        memory = step.lower(state, Weights(base), batch).compile().memory_analysis()

        # While stage icd trains on a base of its own, here the same again, the model is loaded as well.
        beside = bytes_on_device(base) if planned.name == "icd" else 0
        assert planned.base == bytes_on_device(base) + beside
        assert planned.trainable == planned.gradients == bytes_on_device(state.trainable)
        assert planned.optimizer == bytes_on_device(state.opt_state)
        assert planned.batch == 2 * bytes_on_device(batch)
        assert planned.temporaries == memory.temp_size_in_bytes
        arguments = planned.base + planned.trainable + planned.optimizer + planned.batch // 2
        assert memory.argument_size_in_bytes == pytest.approx(arguments - beside, rel=0.01)
        assert planned.total == arguments + planned.batch // 2 + planned.temporaries


@pytest.mark.parametrize(
    ("objective", "stages"),
    [("paper", ["units"]), ("pairs", ["icd", "icd_right", "units"]), ("preference", ["units"])],
)
def test_the_plan_has_the_stages_of_its_objective(tiny, objective, stages):
    checkpoint = tiny("gqa", **SIZES)
    mesh = make_mesh(2, 2, 2)
    paper = plan(config_of(checkpoint.directory), mesh)[-1]
    config = config_of(checkpoint.directory, f"objective={objective}", "icd.batch_size=8", "icd.lora.rank=4")
    planned = plan(config, mesh)
    units = planned[-1]
    assert [stage.name for stage in planned] == stages
    # The adapters are frozen there, and every question is two rows.
    adapters = 2 * planned[0].trainable if objective == "pairs" else 0
    assert units.base == paper.base + adapters
    assert units.trainable == paper.trainable
    if objective == "paper":
        assert units == paper
    else:
        assert units.batch == 2 * paper.batch
        assert units.activations > paper.activations


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Plans of stage units of a model with 16 layers; equal calls share one."""
    model = tmp_path_factory.mktemp("model")
    fields = TINY.to_hf() | SIZES | {"hidden_size": 256, "vocab_size": 96, "num_hidden_layers": 16}
    (model / "config.json").write_text(json.dumps(fields))

    @functools.cache
    def make(*settings, mesh=(4, 2, 1)):
        settings = ("data.max_length=60", "batch_size=32", *settings)
        (stage,) = plan(config_of(model, *settings), make_mesh(*mesh))
        return stage

    return make


def test_twice_the_shards_hold_half_each(planned):
    large, small = planned(), planned(mesh=(2, 4, 1))
    norms = (2 * 16 + 1) * 256 * 4  # these are whole on every device, as are the gates' biases
    assert large.base - norms == 2 * (small.base - norms)
    biases = 16 * 2 * 4
    assert large.trainable - biases == 2 * (small.trainable - biases)
    assert large.optimizer > 1.99 * small.optimizer


def test_bfloat16_takes_half_of_float32(planned):
    wide, narrow = planned(), planned("dtype=bfloat16")
    assert narrow.base == wide.base / 2
    assert narrow.gradients == wide.gradients
    assert narrow.activations < 0.75 * wide.activations


def test_remat_and_accumulation_save_activations(planned):
    kept, saved = planned(), planned("remat=full", "accumulation=4")
    assert saved.activations < 0.25 * kept.activations
    assert saved.batch == kept.batch


def test_verdict_and_advice(only_config):
    config = config_of(only_config(), "dtype=float32", "batch_size=48")
    mesh = make_mesh(4, 2, 1)
    stage = StagePlan("units", *range(10**9, 7 * 10**9, 10**9))
    assert verdict(config, stage, mesh, "v4", stage.total).startswith("fits: ")
    line = verdict(config, stage, mesh, "v4", stage.total - 1)
    assert line.startswith("does not fit: ")
    # 48 rows over 8 devices: 2 micro-batches of 24 leave 3 rows each.
    ways = ["dtype=bfloat16", "remat=full", "accumulation=2", "mesh.fsdp=4 on twice as many devices"]
    assert advice(config, stage, mesh) == ways
    config = config_of(only_config(), "dtype=bfloat16", "remat=full", "batch_size=24", "accumulation=3")
    assert advice(config, stage, mesh) == ways[3:]
    share = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert share in verdict(config, stage, mesh, "h200", stage.total / 0.8)
    assert share not in verdict(config, stage, mesh, "h200", stage.total / 0.7)
    assert share not in verdict(config, stage, mesh, "v4", stage.total / 0.8)


PARAMETERS = {
    "meta-llama/Llama-2-7b-chat-hf": 6_738_415_616,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
}


def test_every_published_size_is_checked():
    assert json.loads(PUBLISHED_SIZES.read_text()).keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_have_the_published_number_of_parameters(name):
    config, dtype = model_config(name)
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(model.weights().base)) == PARAMETERS[name]
    assert dtype == ("float16" if "Llama-2" in name else "bfloat16")
    assert model_config(f"{name}#layers=3")[0] == dataclasses.replace(config, num_layers=3)
    with user_error("layers"):
        model_config(f"{name}#layers=99")


def test_a_model_has_the_same_config_with_and_without_its_weights(tiny, tmp_path):
    checkpoint = tiny("qwen2", dtype="bfloat16")
    text = (checkpoint.directory / "config.json").read_text()
    (tmp_path / "config.json").write_text(text)
    for directory in (checkpoint.directory, tmp_path):
        assert model_config(str(directory)) == (checkpoint.load().config, "bfloat16")
        assert model_config(f"{directory}#layers=2")[0].num_layers == 2


@pytest.mark.slow
def test_command_plans_70b_as_shipped(tmp_path):
    run = run_python(["-m", "imae_jax.train", "plan", "--config", "llama3_1_70b_instruct"], tmp_path)
    assert run.returncode == 0, run.stderr
    assert "base, frozen" in run.stdout
    last = run.stdout.strip().splitlines()[-1]
    used = float(last.removeprefix("fits: ").split()[0])
    # 70.6e9 bfloat16 weights and 21e9 float32 ones with gradients and two moments, over 8 devices.
    exact = (2 * 70.55e9 + 16 * 80 * 3 * 8192 * 10688) / 8 / GIB
    assert exact < used < 100
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def on_these_devices(monkeypatch):
    """The command on the devices that this process has already."""
    monkeypatch.setattr("imae_jax.train.__main__._set_up_devices", lambda *_: None)
    monkeypatch.setattr("imae_jax.targets.Target.compiler", None)


def test_command_says_what_does_not_fit(only_config, on_these_devices, capsys):
    settings = ["batch_size=8", "data.max_length=20", "mesh.fsdp=4", f"model={only_config()}"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--memory", "0.0001", *settings])
    assert ended.value.code == 1
    output = capsys.readouterr()
    assert output.err == ""
    assert "8 × a device of 0.0001 GiB: data=2 fsdp=4 tensor=1" in output.out
    assert output.out.splitlines()[-1].startswith(
        "does not fit: 0.0 of 0.0 GiB (stage units); try remat=full"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "abacus is not known: use one of a100-40gb, "),
        (["--memory", "-1"], "--memory -1"),
        (["--here", "--devices", "2"], "--devices goes without --here"),
        (["model=org/unknown"], "org/unknown is no local path"),
        (["model=org/unknown#layers=2"], "org/unknown is no local path"),
        (["mesh.tensor=8", "model={tiny}"], "num_heads 4 is not divisible"),
        (["mesh.fsdp=3"], "mesh data=2 fsdp=3 tensor=1 needs 6 devices but there are 8"),
        (["batch_size=12"], "choose a multiple of 8"),
        (["dtype=int8"], "dtype 'int8'"),
        (["surprise"], "key=value"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_command_refuses_in_one_line(only_config, on_these_devices, capsys, arguments, message):
    arguments = [argument.format(tiny=only_config()) for argument in arguments]
    assert message in error_of(capsys, main, "plan", "--config", "llama2_7b_chat", *arguments)


def test_command_takes_the_number_of_devices(tmp_path):
    arguments = ["--config", "llama2_7b_chat", "--devices", "3", "mesh.fsdp=2"]
    run = run_python(["-m", "imae_jax.train", "plan", *arguments], tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert "needs 2 devices but there are 3" in run.stderr
