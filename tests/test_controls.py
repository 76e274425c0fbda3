"""Controls: reversed and random directions, units from elsewhere, and what they say of a gain."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import (
    TINY,
    assert_bitwise,
    error_of,
    log_softmax,
    stack,
    user_error,
    with_random_units,
    write_questions,
    write_rows,
)
from helpers.models import random_adapter

from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.decode.methods import Stream, StreamLogits, parse_method
from imae_jax.decode.methods.in_model_contrast import InModelContrast
from imae_jax.decode.noise import with_noise
from imae_jax.evaluate.compare import compare_runs
from imae_jax.evaluate.halueval import main as halueval
from imae_jax.evaluate.harm import main as harm
from imae_jax.evaluate.iti import main as iti
from imae_jax.evaluate.report import main as report
from imae_jax.evaluate.reporting.controls import decompose
from imae_jax.evaluate.runner.controls import Controls
from imae_jax.evaluate.steer import main as steer
from imae_jax.evaluate.truthfulqa import main as truthfulqa

UNITS, LORA, SHIFTS = Stream(strength=-1.0), Stream(adapter=1.0), Stream(shift=2.0)
VECTORS = Stream(steer=1.0)


@pytest.fixture(scope="module")
def weights(tiny_imae):
    """In layers, with units, an adapter, shifts of heads and vectors."""
    lm = tiny_imae.load()
    rng = np.random.default_rng(0)
    L, D, N, H = TINY.num_layers, TINY.hidden_size, TINY.num_heads, TINY.head_dim

    def normal(*shape):
        return jax.numpy.asarray(rng.normal(size=shape), jax.numpy.float32)

    lora = tuple({"wq": {"a": normal(D, 2), "b": normal(2, N, H)}} for _ in range(L))
    shifts, vectors = (tuple(normal(*shape) for _ in range(L)) for shape in ((N, H), (D,)))
    return dataclasses.replace(lm.model.weights(), lora=lora, shifts=shifts, vectors=vectors)


def outputs(weights):
    """All that noise changes, of every layer."""
    return [
        [np.asarray(x) for x in (units["w_down"], lora["wq"]["b"], shift, vector)]
        for units, lora, shift, vector in zip(
            weights.units, weights.lora, weights.shifts, weights.vectors, strict=True
        )
    ]


def test_noise_changes_the_signs_of_output_dimensions_and_nothing_else(weights):
    noisy = with_noise(weights, [UNITS, LORA, SHIFTS, VECTORS], 3)
    for learned, random in zip(outputs(weights), outputs(noisy), strict=True):
        for before, after, inputs in zip(learned, random, (1, 1, 0, 0), strict=True):
            assert_bitwise(abs(before), abs(after))
            signs = np.sign(before) * np.sign(after)
            changed = (signs == -1).mean()
            assert 0.1 < changed < 0.9
            if inputs:
                assert (signs == signs[:1]).all(), "one sign for all inputs of a dimension"
    again = with_noise(noisy, [UNITS, LORA, SHIFTS, VECTORS], 3)
    jax.tree.map(assert_bitwise, again, weights)
    assert_bitwise(noisy.units[0]["w_up"], weights.units[0]["w_up"])
    other = with_noise(weights, [UNITS, LORA, SHIFTS], 4)
    assert (np.asarray(other.units[0]["w_down"]) != np.asarray(noisy.units[0]["w_down"])).any()
    units_alone = with_noise(weights, [UNITS], 3, 2.0)
    assert units_alone.lora is weights.lora
    np.testing.assert_array_equal(units_alone.units[1]["w_down"], 2 * noisy.units[1]["w_down"])


def test_noise_is_the_same_in_both_layouts_of_layers(tiny_imae):
    layers = tiny_imae.load().model.weights()
    stacked = stack(layers)
    expected = with_noise(layers, [UNITS], 5).units
    actual = with_noise(stacked, [UNITS], 5).units
    for i, layer in enumerate(expected):
        assert_bitwise(actual["w_down"][i], layer["w_down"])


def test_noise_of_a_method(tiny_imae):
    lm = tiny_imae.load()

    def score(method):
        return np.array(lm.score("t3 t4", [" t5 t6", " t7"], method, format="raw"))

    first, second = score("imae:noise=0"), score("imae:noise=1")
    assert (first != second).all()
    assert (first != score("expert")).all()
    assert np.abs(score("imae:noise=0,noise_scale=0.01") - score("base")).max() < 0.01
    methods = [parse_method(f"imae:noise={seed}") for seed in (0, 1)]
    assert methods[0] == methods[1], "one compiled program"
    assert methods[0].settings() != methods[1].settings()
    assert "noise" not in parse_method("expert").settings()
    second_model = f"icd:anti_expert={lm.base.reference}#layers=1,noise=1"
    for wrong in ("imae:noise=-1", "imae:strength=0,noise=1", second_model):
        with user_error("noise="):
            score(wrong)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_a_flipped_contrast_is_what_both_sides_give_the_other_way_round(beta):
    rng = np.random.default_rng(1)
    strong, weak = rng.normal(size=(2, 5, 11))
    logits = [StreamLogits(jax.numpy.asarray(x, jax.numpy.float32)) for x in (strong, weak)]
    method = InModelContrast(beta, renormalize=True).resolve(TINY, generating=False)
    strong, weak = map(log_softmax, (strong, weak))
    expected = log_softmax((beta - 1) * strong - (strong - weak))
    np.testing.assert_allclose(method.flipped().scores(logits), expected, atol=2e-5)
    assert method.flipped().flipped() == method
    assert parse_method(method.flipped().settings()) == method.flipped()


@pytest.mark.parametrize(
    "text",
    ["dexperts:expert=a,anti_expert=b", "cd:amateur=m,beta=0.5", "prunecd:skip=1,beta=2", "prunecd:skip=1"],
)
def test_base_lies_half_way_between_a_centred_contrast_and_its_flip(text):
    logits = [StreamLogits(jax.numpy.asarray(x)) for x in np.random.default_rng(2).normal(size=(3, 5, 11))]
    method = dataclasses.replace(parse_method(text), renormalize=False)
    method = method.resolve(dataclasses.replace(TINY, num_layers=2), generating=False)
    both = [each.scores(logits) for each in (method, method.flipped())]
    assert np.abs(both[0] - both[1]).max() > 1
    half_way = np.abs(sum(both) / 2 - log_softmax(logits[0].final)).max() < 1e-5
    assert half_way == method.centred == (text != "prunecd:skip=1")


def test_directions_have_an_opposite():
    assert parse_method("expert").flipped() == parse_method("anti-expert")
    assert parse_method("iti:directions=f,alpha=3").flipped() == parse_method("iti:directions=f,alpha=-3")
    assert parse_method("steer:vectors=f,strength=3").flipped() == parse_method("steer:vectors=f,strength=-3")
    assert parse_method("base").flipped() is None
    assert parse_method("sled").flipped() is None


@pytest.fixture(scope="module")
def other_units(tiny_imae, tmp_path_factory):
    """Other units for the base of `tiny_imae`."""
    lm, path = tiny_imae.load(), tmp_path_factory.mktemp("other") / "imae"
    plain = dataclasses.replace(lm.model.weights(), units=None)
    weights = with_random_units(plain, lm.config, 8)
    write_imae_dir(
        path,
        weights,
        lm.config,
        dataclasses.replace(lm.model.anti_expert_config, intermediate_size=8),
        base=dataclasses.asdict(lm.base),
        training={},
    )
    return path


def test_units_from_another_model(tiny_imae, other_units, tiny):
    from imae_jax.convert import load_model

    lm, other = tiny_imae.load(), load_model(str(other_units))
    arguments = "t3 t4", [" t5 t6", " t7"]
    expected = other.score(*arguments, "expert", format="raw")
    assert lm.score(*arguments, f"imae:units_from={other_units}", format="raw") == expected
    assert lm.score(*arguments, "expert", format="raw") != expected
    plain = load_model(lm.base.reference)
    assert plain.score(*arguments, f"imae:units_from={other_units}", format="raw") == expected
    stranger = tiny("gqa", seed=9)
    with user_error("units_from=", "trained on other weights"):
        stranger.load().score(*arguments, f"imae:units_from={other_units}", format="raw")
    with user_error("has no anti-expert units"):
        lm.score(*arguments, f"imae:units_from={stranger.directory}", format="raw")


def test_a_gain_is_split_into_odd_and_even_parts():
    rng = np.random.default_rng(2)
    values = {name: rng.integers(0, 2, 40) for name in ("base", "m", "m/flip", "m/noise-0", "m/noise-1")}
    records = {name: [{"mc1": float(v)} for v in each] for name, each in values.items()}
    controls = {"m": Controls("m/flip", ("m/noise-0", "m/noise-1"))}
    parts = decompose(records, ["mc1"], controls, base="base", seed=0)["m"]["mc1"]
    mean = {name: 100 * each.mean() for name, each in values.items()}
    assert parts["gain"]["value"] == pytest.approx(mean["m"] - mean["base"])
    assert parts["odd"]["value"] == pytest.approx((mean["m"] - mean["m/flip"]) / 2)
    assert parts["odd"]["value"] + parts["even"]["value"] == pytest.approx(parts["gain"]["value"])
    assert parts["noise"] == pytest.approx([mean[f"m/noise-{i}"] - mean["base"] for i in (0, 1)])
    low, high = parts["odd"]["interval"]
    assert low < parts["odd"]["value"] < high


@pytest.fixture(scope="module")
def controlled(scored, other_units, tiny_imae, tmp_path_factory):
    """A finished run with controls: its arguments and its directory, not to be changed."""
    command, _ = scored
    out = tmp_path_factory.mktemp("controlled") / "out"
    command = [*map(str, command), "--quiet", "--controls", "2"]
    command[command.index("--out") + 1] = str(out)
    lm = tiny_imae.load()
    adapters = [random_adapter(out.parent / f"{i}", lm.config, lm.base.reference, seed=i) for i in (0, 1)]
    methods = ["base,expert,1", CONTRAST, "dola", "dexperts:expert={},anti_expert={}".format(*adapters)]
    command[command.index("--methods") + 1] = ",".join(methods)
    assert truthfulqa([*command, "--placebo", f"expert=imae:units_from={other_units}"]) == 0
    return command, out


def test_a_run_with_controls(controlled):
    _, out = controlled
    results = json.loads((out / "results.json").read_text())
    *others, dexperts = results["methods"]
    assert others == ["base", "expert", "1", CONTRAST, "dola"]
    controls = results["controls"]
    assert list(controls) == ["expert", "1", CONTRAST, "dola", dexperts]
    assert list(controls["dola"]["runs"]) == ["dola/flip"]
    assert controls["expert"]["runs"]["expert/flip"]["mc2"] == results["methods"]["1"]["mc2"]
    kl = controls["expert"]["kl"]
    assert kl["expert"] > 0
    for name in ("expert/noise-0", "expert/noise-1"):
        assert kl[name] == pytest.approx(kl["expert"], rel=0.1), "as far from base as the learned direction"
        assert controls["expert"]["runs"][name]["settings"]["noise_scale"] != 1
    parts = controls["expert"]["metrics"]["mc2"]
    flip = controls["expert"]["runs"]["expert/flip"]["mc2"]
    assert parts["odd"]["value"] == pytest.approx((results["methods"]["expert"]["mc2"] - flip) / 2)
    assert {"odd", "even", "gain", "flip", "noise", "twins", "placebo"} == parts.keys()
    assert "odd" not in controls["dola"]["metrics"]["mc2"], "no mode lies between it and its flip"
    assert "odd" in controls[CONTRAST]["metrics"]["mc2"]
    assert list(controls[dexperts]["runs"]) == [f"{dexperts}/{x}" for x in ("flip", "noise-0", "noise-1")]
    assert controls[dexperts]["kl"][dexperts] > 0
    assert "odd" in controls[dexperts]["metrics"]["mc2"]
    table = (out / "table.md").read_text()
    assert "expert/noise-0" not in table
    assert f"{parts['odd']['value']:+.2f}" in table
    assert (out / "strengths.png").exists()


CONTRAST = "in-model-contrast:beta=2,renormalize=true"


def test_a_control_is_compared_like_a_method(controlled):
    _, out = controlled
    results = json.loads((out / "results.json").read_text())
    (compared,) = compare_runs(out, out, [("expert", "expert/flip"), ("1", "expert/flip")])["parts"].values()
    flip = results["controls"]["expert"]["runs"]["expert/flip"]["mc2"]
    difference = compared["expert → expert/flip"]["mc2"]["value"]
    assert difference == pytest.approx(flip - results["methods"]["expert"]["mc2"])
    assert compared["1 → expert/flip"]["mc2"]["value"] == 0


def test_a_killed_run_with_controls_goes_on(controlled, other_units, tmp_path):
    command, out = controlled
    killed = tmp_path / "out"
    shutil.copytree(out, killed)
    (killed / "results.json").unlink()
    lines = (killed / "scores.jsonl").read_text().splitlines(keepends=True)
    (killed / "scores.jsonl").write_text("".join(lines[:20]))
    command = [*command, "--placebo", f"expert=imae:units_from={other_units}", "--resume"]
    command[command.index("--out") + 1] = str(killed)
    assert truthfulqa(command) == 0
    before, after = (json.loads((path / "results.json").read_text()) for path in (out, killed))
    assert after["resumed_lines"] == 20
    assert after["controls"]["expert"]["metrics"] == before["controls"]["expert"]["metrics"]


def test_random_directions_of_a_resumed_run_keep_their_size(controlled, other_units, tmp_path):
    """On another machine the search for it may end elsewhere."""
    command, out = controlled
    killed = tmp_path / "out"
    shutil.copytree(out, killed)
    (killed / "results.json").unlink()
    run = json.loads((killed / "run.json").read_text())
    run["methods"]["expert/noise-0"]["noise_scale"] = 1.25
    (killed / "run.json").write_text(json.dumps(run))
    command = [*command, "--placebo", f"expert=imae:units_from={other_units}", "--resume"]
    command[command.index("--out") + 1] = str(killed)
    assert truthfulqa(command) == 0
    runs = json.loads((killed / "results.json").read_text())["controls"]["expert"]["runs"]
    assert runs["expert/noise-0"]["settings"]["noise_scale"] == 1.25


def test_twins_and_methods_with_noise(scored, tmp_path, capsys):
    command = [*map(str, scored[0]), "--quiet", "--controls", "1", "--limit", "2"]
    command[command.index("--out") + 1] = str(tmp_path / "out")
    command[command.index("--methods") + 1] = "base,expert,imae:strength=1,noise=3"
    assert truthfulqa([*command, "--twin", "expert=imae:strength=-0.5"]) == 0
    controls = json.loads((tmp_path / "out" / "results.json").read_text())["controls"]
    assert list(controls) == ["expert"]
    assert list(controls["expert"]["runs"]) == ["expert/flip", "expert/noise-0", "expert/twin-0"]
    parts = controls["expert"]["metrics"]["mc2"]
    assert (len(parts["noise"]), len(parts["twins"])) == (1, 1)
    assert "; with other training seeds " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fit", "settings"),
    [(iti, "iti:directions={},alpha=5,heads=2"), (steer, "steer:vectors={},strength=0.5,scope=prompt")],
    ids=["iti", "steer"],
)
def test_controls_of_directions_in_a_folder_of_folds(tiny_imae, tmp_path, fit, settings):
    """Questions get the directions of their fold, with random signs as learned ones."""
    questions = write_questions(tmp_path / "questions.csv")
    command = ["--model", tiny_imae.directory, "--data", questions, "--quiet"]
    assert fit([*map(str, command), "--out", str(tmp_path / "folds")]) == 0
    (tmp_path / "primer.txt").write_text("Q: t3 t4\nA: t5 .\n\n")
    method = settings.format(tmp_path / "folds")
    command += ["--methods", f"base,{method}", "--controls", "2", "--any-data"]
    command += ["--primer", tmp_path / "primer.txt", "--out", tmp_path / "out"]
    assert truthfulqa([*map(str, command)]) == 0
    controls = json.loads((tmp_path / "out" / "results.json").read_text())["controls"][method]
    scales = [controls["runs"][f"{method}/noise-{i}"]["settings"]["noise_scale"] for i in (0, 1)]
    assert len({*scales, 1.0}) == 3
    assert controls["kl"][f"{method}/noise-0"] == pytest.approx(controls["kl"][method], rel=0.1)


def test_controls_of_preferences(tiny_imae, tmp_path):
    """HaluEval has its summaries in parts: of all pairs and of matched ones."""
    command = ["--model", tiny_imae.directory, "--methods", "base,expert", "--quiet", "--controls", "1"]
    command += ["--data", write_rows(tmp_path / "rows.jsonl", 6), "--out", tmp_path / "out"]
    assert halueval([*map(str, command)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["parts"]["all"]) == list(results["methods"]) == ["base", "expert"]
    gain = results["controls"]["expert"]["metrics"]["raw"]["gain"]["value"]
    assert gain == pytest.approx(results["methods"]["expert"]["raw"] - results["methods"]["base"]["raw"])


def test_controls_in_reports_and_on_neutral_text(controlled, tiny_imae, tmp_path):
    _, out = controlled
    arguments = [
        "--model",
        str(tiny_imae.directory),
        "--methods",
        "base,expert",
        "--controls",
        "1",
        "--quiet",
    ]
    assert harm([*arguments, "--out", str(tmp_path / "harm")]) == 0
    measured = json.loads((tmp_path / "harm" / "results.json").read_text())["methods"]
    assert list(measured) == ["base", "expert", "expert/flip", "expert/noise-0"]
    assert report([str(out), str(tmp_path / "harm"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "What the direction brings" in text
    assert "expert, MC1: of " in text


@pytest.mark.parametrize(
    ("methods", "arguments", "parts"),
    [
        ("base,sled", ["--controls"], ["sled", "direction"]),
        ("expert,1", ["--controls"], ["add base"]),
        ("base,expert", ["--controls", "-1"], ["--controls", "-1"]),
        ("base,expert", ["--placebo", "expert=1"], ["--controls"]),
        ("base,expert", ["--controls", "--placebo", "dola=1"], ["--placebo dola=1", "LABEL=METHOD"]),
        ("base,expert", ["--controls", "--placebo", "expert=1", "--placebo", "expert=2"], ["given twice"]),
        ("base,expert", ["--controls", "--twin", "expert=nothing"], ["nothing"]),
    ],
)
def test_controls_that_cannot_be_run_are_refused(scored, tmp_path, capfd, methods, arguments, parts):
    command = [*map(str, scored[0]), *arguments]
    command[command.index("--out") + 1] = str(tmp_path / "out")
    command[command.index("--methods") + 1] = methods
    error = error_of(capfd, truthfulqa, *command)
    assert all(part in error for part in parts), error
    assert not (tmp_path / "out").exists()
