"""The cost of decoding: figures, the command, traces, models of random weights, the benchmarks' peers."""

import dataclasses
import importlib
import importlib.util
import json
import math
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SMOLLM2, TINY, error_of, import_torch, run_python, user_error, with_random_units
from helpers.documents import blocks

from imae_jax.config import AntiExpertConfig
from imae_jax.convert.imae_dir import write_imae_dir
from imae_jax.convert.random_model import random_model
from imae_jax.convert.references import BUILT_IN, model_config
from imae_jax.decode import Continuation, generate, parse_method, score
from imae_jax.evaluate import cost, report
from imae_jax.evaluate.cost import main
from imae_jax.evaluate.measurement import Source, load_base, load_with_units
from imae_jax.evaluate.timing import MemoryMeter, Timing, Workload, time_runs
from imae_jax.llama import Weights

ROOT = Path(__file__).parents[1]
NO_OPTIONS = dict.fromkeys(("dtype", "revision", "tokenizer", "base"))


def arguments(tiny, tmp_path, *more) -> list[str]:
    directory = tiny("gqa").directory
    return [*map(str, ("--model", directory, "--out", tmp_path / "out", "--quiet", *more))]


def test_the_first_run_counts_apart():
    timings = iter([Timing(3.0, 2.0, 10), Timing(0.1, 0.2, 10), Timing(0.3, 0.6, 10), Timing(0.2, 0.4, 10)])
    figures = time_runs(lambda: next(timings), 3, MemoryMeter())
    assert figures["ms_per_token"] == pytest.approx(40)
    assert figures["times_ms"] == pytest.approx([20, 60, 40])
    assert figures["prefill_ms"] == pytest.approx(200)
    assert figures["first_token_s"] == 3.0
    assert figures["compile_s"] == pytest.approx(5.0 - 0.6)


def test_memory_is_that_of_weights_and_of_what_comes_while_decoding():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux forgets the peak of a process")
    megabytes = 1 << 20
    np.ones(96 * megabytes, np.uint8)  # a peak before
    meter = MemoryMeter()
    assert meter.peak_bytes(1000) is None
    meter.start()
    assert 1000 <= meter.peak_bytes(1000) < 16 * megabytes
    np.ones(64 * megabytes, np.uint8)
    # The kernel counts in batches of pages.
    assert 60 * megabytes <= meter.peak_bytes(1000) < 80 * megabytes


@pytest.fixture(autouse=True, scope="module")
def quick_compiling():
    """In the processes that measure: how fast the programs are is not asserted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two methods at one batch size, with traces; of random weights, which need no tokenizer."""
    path = tmp_path_factory.mktemp("cost")
    more = ("--methods", "dola", "--batch-sizes", 2, "--prompt-tokens", 5, "--new-tokens", 9, "--repeats", 2)
    more = (*more, "--out", path / "out", "--profile", path / "traces", "--quiet", "--random-weights")
    assert main([*map(str, ("--model", write_sizes(path / "sizes"), *more))]) == 0
    return path


def test_the_command_writes_figures_a_table_and_a_plot(measured):
    results = json.loads((measured / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["workload"] == {"prompt_tokens": 5, "new_tokens": 9, "repeats": 2}
    assert results["dtype"] == "float32"
    assert results["environment"]["versions"]["backend"] == jax.default_backend()
    assert results["environment"]["cpu_cores"] >= 1
    assert list(results["batch_sizes"]) == ["2"]
    rows = results["batch_sizes"]["2"]
    # Base comes first without being asked for.
    assert list(rows) == ["base", "dola"]
    for row in rows.values():
        assert len(row["times_ms"]) == 2
        assert row["ms_per_token"] == pytest.approx(sum(row["times_ms"]) / 2)
        assert 0 < row["prefill_ms"] < 1e3 * row["first_token_s"]
        assert row["compile_s"] > 0
        assert row["memory_bytes"] is None or row["memory_bytes"] >= row["weight_bytes"] > 0
    assert rows["base"]["weight_bytes"] == rows["dola"]["weight_bytes"]
    assert rows["dola"]["settings"]["candidates"] == [1]  # of 3 layers
    table = (measured / "out" / "table.md").read_text(encoding="utf-8")
    assert f"| dola | {rows['dola']['memory_bytes'] / 1e9:.2f} | " in table
    assert f" | {rows['dola']['ms_per_token'] / rows['base']['ms_per_token']:.2f} | " in table
    assert (measured / "out" / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_shows_the_figures_beside_the_papers(measured, tmp_path):
    assert report.main([str(measured / "out"), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    base, dola = json.loads((measured / "out" / "results.json").read_text())["batch_sizes"]["2"].values()
    ratios = [dola[key] / base[key] for key in ("memory_bytes", "ms_per_token")]
    gigabytes = [dola[key] / 1e9 for key in ("memory_bytes", "weight_bytes")]
    cells = [gigabytes[0], ratios[0], gigabytes[1], dola["ms_per_token"], ratios[1]]
    assert f"| dola | {' | '.join(f'{cell:.2f}' for cell in cells)} | " in text
    assert "| IMAE | 18.4 | 1.4 | 2.60 | 1.2 |" in text
    assert (tmp_path / "report" / "1-cost.png").exists()


def test_traces_hold_the_names_of_steps_and_layers(measured):
    rows = json.loads((measured / "traces" / "results.json").read_text())["batch_sizes"]["2"]
    for label, row in rows.items():
        directory = measured / "traces" / row["profile"]
        assert (directory / "memory.prof").stat().st_size > 0
        (file,) = directory.rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        events = [event for plane in data.planes for line in plane.lines for event in line.events]
        steps = [(e.name, dict(e.stats)["step_num"]) for e in events if e.name in ("prefill", "decode")]
        # The prefill's token, and one compiled chunk of the other 8.
        assert sorted(steps) == [("decode", 1), ("prefill", 0)]
        modules = {dict(event.stats).get("hlo_module") for event in events}
        assert {"jit__prefill", "jit__decode_chunk"} <= modules
        # Where events do not carry the scopes, the program that lies beside them does.
        content = file.read_bytes()
        for scope in ("layer_0/attention", "layer_2/mlp", "unembed", f"closed_call/{label}/"):
            assert scope.encode() in content, scope
        (trace,) = directory.rglob("*.trace.json.gz")
        assert trace.stat().st_size > 0


BAD = {
    "unknown method": (["--methods", "truth"], "'truth' does not exist"),
    "no new token": (["--new-tokens", "0"], "--new-tokens: give at least 2, not 0"),
    "no step": (["--new-tokens", "1"], "--new-tokens: give at least 2, not 1"),
    "no prompt": (["--prompt-tokens", "0"], "--prompt-tokens: give at least 1"),
    "no run": (["--repeats", "0"], "--repeats: give at least 1"),
    "no row": (["--batch-sizes", "1,0"], "different numbers from 1 on"),
    "no number": (["--batch-sizes", "1,many"], "--batch-sizes 1,many"),
    "twice": (["--batch-sizes", "2,2"], "different numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_a_model_is_loaded(case, tmp_path, capfd):
    more, message = BAD[case]
    assert message in error_of(capfd, main, "--model", "no-such-model", "--out", tmp_path / "out", *more)
    assert not any(tmp_path.iterdir())


def test_existing_results_stay(tiny, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main(arguments(tiny, tmp_path)) == 2
    assert "exists already" in capfd.readouterr().err
    assert main(arguments(tiny, tmp_path, "--overwrite")) == 2
    assert "holds no results.json" in capfd.readouterr().err
    for profile in (tmp_path / "out", tmp_path / "out" / "traces", tmp_path):
        assert main(arguments(tiny, tmp_path, "--overwrite", "--profile", profile)) == 2
        assert "choose another directory than OUT, beside it" in capfd.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_one_of_several_tasks_does_not_measure(tmp_path, monkeypatch, capfd):
    """Each would measure on its own, all at the same time."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    error = error_of(capfd, main, "--model", "no-such-model", "--out", tmp_path / "out")
    assert "start it once, outside of a step of several tasks" in error


def test_an_error_of_a_measurement_is_the_commands(tmp_path, capfd):
    """Also one that comes as late as in the process that measures."""
    command = ["--model", tmp_path / "nowhere", "--out", tmp_path / "out", "--profile", tmp_path / "t"]
    assert "nowhere' does not exist" in error_of(capfd, main, *command, "--quiet")
    assert not any(tmp_path.iterdir())


def test_base_is_what_others_are_compared_to():
    methods = {"dola": parse_method("dola"), "base": parse_method("base")}
    assert list(cost.with_base(methods)) == ["base", "dola"]
    with user_error("the label 'base'"):
        cost.with_base({"base": parse_method("dola")})


def test_methods_without_units_are_measured_without_them(tiny, tmp_path):
    lm = tiny("gqa").load()
    weights = with_random_units(lm.model.weights(), lm.config)
    write_imae_dir(
        tmp_path / "imae",
        Weights(weights.base, weights.units),
        lm.config,
        AntiExpertConfig(24),
        base=dataclasses.asdict(lm.base),
        training={},
    )
    source = Source(str(tmp_path / "imae"), NO_OPTIONS)
    assert load_with_units(source).model.weights().units is not None
    bare = load_base(source)
    assert bare.model.weights().units is None
    assert bare.base.fingerprint == lm.base.fingerprint
    moved = Source(str(tmp_path / "imae"), NO_OPTIONS | {"base": str(tiny("gqa").directory)})
    assert load_base(moved).base.fingerprint == lm.base.fingerprint


def write_sizes(directory: Path, **fields) -> str:
    """A model of which there is config.json alone; of few shapes, since each is compiled to be drawn."""
    directory.mkdir(exist_ok=True)
    few_shapes = {"intermediate_size": 32, "vocab_size": 32, "num_kv_heads": 4, "head_dim": 8}
    config = dataclasses.replace(TINY, **few_shapes | fields)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    return str(directory)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("expert", {"units"}),
        ("icd:anti_expert=adapter", {"lora"}),
        ("iti:directions=random,heads=4", {"shifts"}),
        ("steer:vectors=random", {"vectors"}),
        ("cd:amateur={model}#layers=1", set()),
    ],
)
def test_any_method_runs_on_random_weights(name, fields, tmp_path):
    model = write_sizes(tmp_path, num_layers=2)
    source = Source(model, NO_OPTIONS | {"dtype": "bfloat16"}, random_weights=True)
    lm = (load_with_units if "units" in fields else load_base)(source)
    assert lm.config.num_layers == 2
    assert lm.model.weights().dtype == jax.numpy.bfloat16
    models, method = lm.prepare(name.format(model=model), generating=True)
    present = {f for f in ("units", "lora", "shifts", "vectors") if getattr(models.weights[0], f) is not None}
    assert present == fields
    assert len(models.weights) == 1 + ("{model}" in name)
    # One token is the prefill's: decoding would have to be compiled as well.
    (row,) = generate(models, lm.config, [[5, 6, 7]], method=method, max_new_tokens=1)
    assert len(row) == 1


def test_random_weights_refuse_what_does_not_fit(tmp_path):
    model = write_sizes(tmp_path / "model", num_layers=1)
    other = write_sizes(tmp_path / "other", num_layers=1, vocab_size=98)
    with user_error("dtype 'float8' does not exist"):
        random_model(model, dtype="float8", units=False)
    lm = random_model(model, dtype="bfloat16", units=False)
    with user_error("cd: amateur=", "another vocabulary"):
        lm.prepare(f"cd:amateur={other}", generating=True)


def load_benchmark(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "base",
        "dola:candidates=0+1+2,alpha=0.1,renormalize=true",
        "sled:scale=7,renormalize=false",
        "sled:scale=7,rate=2",
    ],
)
def test_peers_one_answer_at_a_time_compute_the_same(tiny, name):
    import_torch()
    benchmark = load_benchmark("score")
    lm = tiny("tied").load()
    models, method = lm.prepare(name, generating=False)
    benchmark.check_peer(name, method)
    items = [Continuation((5, 6, 7, 8, 9, 10), 4), Continuation((5, 6, 7, 8, 11), 4)]
    ((_, scored),) = score(models, lm.config, [items], method, row_length=16)
    sums, seconds = benchmark.one_at_a_time(tiny("tied").hf, method, items)
    assert seconds > 0
    # Float32 sums over 97 tokens, and cosines of vectors that nearly cancel.
    np.testing.assert_allclose(sums, [float(s.sum()) for s in scored.scores], rtol=1e-4)


@pytest.mark.parametrize("name", ["expert", "cd:amateur=model", "dola:divergence=jensen-shannon"])
def test_methods_without_a_peer_are_refused(name):
    import_torch()
    with user_error(name, "has no peer"):
        load_benchmark("score").check_peer(name, parse_method(name))


def test_the_peer_of_decoding_is_timed_by_token(tiny):
    import_torch()
    figures = load_benchmark("decode").measure_peer(tiny("gqa").directory, Workload(2, 4, 6, 2))
    assert len(figures["times_ms"]) == 2
    assert all(math.isfinite(ms) and ms > 0 for ms in figures["times_ms"])
    assert figures["weight_bytes"] == 4 * sum(p.numel() for p in tiny("gqa").hf.parameters())


@pytest.mark.slow
def test_the_script_for_accelerators_runs_dry(tmp_path):
    out = tmp_path / "out"
    run = run_python([ROOT / "benchmarks" / "on_device.py", "--dry-run", "--out", out, "--quiet"], tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((out / "on_device.json").read_text(), parse_constant=pytest.fail)
    assert results["passed"] and results["environment"]["versions"]["jax"] == jax.__version__
    rows = {row["what"]: row for part in results["parts"].values() for row in part["rows"]}
    methods = ("base", "expert", "in-model-contrast", "icd:anti_expert=adapter", "dola", "sled:scale=10")
    times = [rows[f"{name}, batch {size}"] for name in methods for size in (1, 2)]
    assert all(row["measured"] > 0 and row["unit"] == "ms/token" for row in times)
    memory = [row for what, row in rows.items() if what.startswith("memory")]
    assert len(memory) == 2 and all(row["beside"] > 0 for row in memory)
    # Without an allocator to ask, nothing is said to have passed.
    asked = jax.devices()[0].memory_stats() is not None
    assert [row["passed"] for row in memory] == [True if asked else None] * 2
    assert 0 < rows["MFU"]["measured"] < 100
    assert rows["flash, 1 × 128 tokens, both ways"]["measured"] > 0
    # Two kernels round differently.
    assert 0 < rows["largest difference / value"]["measured"] < 0.02
    assert list((out / "trace").rglob("*.xplane.pb"))
    table = (out / "table.md").read_text(encoding="utf-8")
    assert all(f"| {what} |" in table for what in rows)


def breaks(model: str):
    raise ValueError("no kernel for this\nand more")


def holds_two_layers(model: str):
    num_layers = model_config(model)[0].num_layers
    if num_layers > 2:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return [], {"num_layers": num_layers}


@pytest.mark.slow
def test_a_part_that_fails_is_a_row_and_a_model_too_large_is_cut(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script, model = importlib.import_module("on_device"), write_sizes(tmp_path / "model", num_layers=8)
    parts = {"broken": script.run_part(breaks, model), "large": script.run_part(holds_two_layers, model)}
    (row,) = parts["broken"]["rows"]
    assert (row.what, row.passed) == ("error: no kernel for this", False)
    assert "in breaks" in parts["broken"]["error"]
    assert parts["large"]["model"] == f"{model}#layers=2"
    assert parts["large"]["figures"] == {"num_layers": 2}
    assert not script.write(tmp_path, "command", script.DRY, parts)
    assert json.loads((tmp_path / "on_device.json").read_text())["passed"] is False
    assert "| error: no kernel for this |" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.docs
@pytest.mark.skipif(
    importlib.util.find_spec(BUILT_IN[SMOLLM2]) is None, reason=f"{BUILT_IN[SMOLLM2]} is not installed"
)
def test_commands_of_the_documentation_run(tmp_path, monkeypatch):
    (commands,) = blocks((ROOT / "docs" / "cost.md").read_text(encoding="utf-8"), "bash")
    monkeypatch.chdir(tmp_path)
    for line in commands.replace("\\\n", " ").splitlines():
        program, flag, module, *command = shlex.split(line)
        assert (program, flag, module) == ("python", "-m", main.__module__)
        assert main(command) == 0
    assert (tmp_path / "out" / "cost" / "cost.png").exists()
    assert len(list((tmp_path / "out" / "traces").rglob("*.xplane.pb"))) == 2
