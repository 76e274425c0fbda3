"""Accelerators to compile for: what is known of them, and that their compilers disturb nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY, error_of, user_error

from imae_jax import targets
from imae_jax.evaluate.cost import main as cost
from imae_jax.sharding import make_mesh, sharding
from imae_jax.targets import TARGETS, abstract_devices

NOTHING_INSTALLED = (None, ())


@pytest.mark.parametrize(
    ("axes", "slices"),
    [
        (2, ["1x1", "2x2", "2x2", "2x4", "4x4", "4x8"]),
        (3, ["1x1x1", "2x2x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4"]),
    ],
)
def test_the_smallest_slice_that_holds_the_devices(axes, slices):
    found = [targets._slice(number, axes) for number in (1, 2, 4, 7, 16, 32)]
    assert ["x".join(map(str, sizes)) for sizes in found] == slices


def test_unknown_devices_and_missing_compilers_are_named(monkeypatch):
    with user_error("abacus is not known: use one of a100-40gb, "):
        abstract_devices("abacus", 1)
    monkeypatch.setattr(targets, "COMPILERS", dict.fromkeys(targets.COMPILERS, NOTHING_INSTALLED))
    for name, how in (
        ("v5p", "pip install 'imae-jax[plan-tpu]'"),
        ("h200", "[plan-gpu]"),
        ("v4", "choose another"),
    ):
        with user_error(f"--device {name}", how):
            abstract_devices(name, 1)


def test_data_sheets_are_those_of_the_very_device():
    kinds = [kind for target in TARGETS.values() for kind in target.kinds]
    assert len(set(kinds)) == len(kinds)
    assert targets.of_kind("NVIDIA H200") == TARGETS["h200"]
    for slower in ("NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "cpu"):
        assert targets.of_kind(slower) is None


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Python code in a process that JAX has not been imported to, with the platform left to it."""
    ours = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"} | environment
    return subprocess.run([sys.executable, "-c", code], env=ours, capture_output=True, text=True, check=True)


def test_a_machine_with_an_accelerator_keeps_its_plugins(tmp_path):
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").touch()
    show = (
        "import imae_jax, os, sys; print(os.environ.get('JAX_PLATFORMS'), 'jax_cuda12_plugin' in sys.modules)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert run(show, PYTHONPATH=path).stdout.split() == ["cpu", "True"]
    assert run(show, PYTHONPATH=path, JAX_PLATFORMS="tpu").stdout.split() == ["tpu", "False"]
    there = "import os; exists = os.path.exists; os.path.exists = lambda p: p == '/dev/nvidia0' or exists(p);"
    assert run(there + show, PYTHONPATH=path).stdout.split() == ["None", "False"]


compilers = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            TARGETS[name].compiler is None, reason=f"[{TARGETS[name].extra}] is not installed"
        ),
    )
    for name in TARGETS
    if TARGETS[name].extra
]


@pytest.mark.compile
@pytest.mark.parametrize("name", compilers)
def test_every_target_gives_devices_to_compile_for(name, without_program_cache):
    default = jax.devices()[0]
    for number in (1, 8):
        devices = abstract_devices(name, number)
        # XLA calls a GPU as we describe it.
        assert TARGETS[name].gpu or targets.of_kind(devices[0].device_kind) == TARGETS[name]
        mesh = make_mesh(tensor=number, devices=devices)
        x = jax.ShapeDtypeStruct((64, 1024), jnp.bfloat16, sharding=sharding(mesh, None, "mlp"))
        compiled = jax.jit(lambda x: x @ x.T).lower(x).compile()
        assert ("all-reduce" in compiled.as_text()) == (number > 1)
    assert jax.devices()[0] == default
    # A child process does not take this for a TPU host: libtpu sets variables behind os.environ.
    child = subprocess.run(["env", "-0"], capture_output=True, text=True, check=True).stdout.split("\0")
    names = {line.partition("=")[0] for line in child}
    assert {name for name in names if "TPU" in name} <= os.environ.keys()


@pytest.mark.compile
@pytest.mark.skipif(
    not any(target.compiler for target in TARGETS.values()), reason="no compiler is installed"
)
def test_nothing_is_heard_of_installed_compilers(tiny):
    """Neither at the import nor where a command computes: one line says that it is done."""
    model = str(tiny("gqa").directory)
    code = f"""
import sys
from pathlib import Path
from imae_jax.generate import main
main(["--model", {model!r}, "--prompt", "t5 t6", "--max-new-tokens", "2", "--quiet"])
import jax
print(jax.default_backend(), jax.config.jax_platforms, file=sys.stderr)
"""
    assert run(code).stderr.splitlines() == ["cpu cpu"]


@pytest.mark.compile
@pytest.mark.parametrize("name", [name for name in compilers if name.values[0] in ("v5e", "h200")])
def test_plan_asks_the_compiler_of_its_device(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    settings = [f"model={tmp_path}", "data.max_length=20", "batch_size=8", "units.intermediate_size=24"]
    arguments = ["plan", "--device", name, "--config", "llama2_7b_chat", "icd.enabled=false", *settings]
    planned = run(f"from imae_jax.train.__main__ import main; main({arguments!r})")
    assert planned.stderr == ""
    assert f"activations: counted by {TARGETS[name].compiler}" in planned.stdout
    assert "fits: 0.0 of" in planned.stdout


@pytest.mark.compile
@pytest.mark.parametrize("name", [name for name in compilers if name.values[0] == "h200"])
def test_cost_prints_the_bounds_of_a_device(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    arguments = ["--model", str(tmp_path), "--device", name, "--methods", "expert", "--batch-sizes", "2"]
    printed = run(f"from imae_jax.evaluate.cost import main; main({arguments!r})")
    assert printed.stderr == ""
    assert f"batch 2, one {name}: bounds of {TARGETS[name].compiler}" in printed.stdout
    lines = [line for line in printed.stdout.splitlines() if line.startswith(("│ base", "│ expert"))]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    (base, *of_base), (expert, *of_expert) = rows
    assert (base, expert) == ("base", "expert")
    assert float(of_expert[3]) > float(of_base[3]) == 1  # A unit is read at every token.


def test_bounds_are_printed_and_not_written(capsys):
    assert "leave out --out" in error_of(capsys, cost, "--model", "x", "--device", "h200", "--out", "y")
    assert "--out is missing" in error_of(capsys, cost, "--model", "x")
    assert "abacus is not known" in error_of(capsys, cost, "--model", "x", "--device", "abacus")


@pytest.mark.compile
@pytest.mark.parametrize("name", [name for name in compilers if name.values[0] == "v5e"])
def test_the_benchmark_appends_its_tables(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    script, out = Path(__file__).parents[1] / "benchmarks" / "compiled.py", tmp_path / "tables.md"
    options = ["--targets", name, "--models", str(tmp_path), "--methods", "base", "--markdown", str(out)]
    made = run(f"import runpy; runpy.run_path({str(script)!r})['main']({options!r})")
    assert made.stderr == ""
    assert "on 1 × v5e (compiled, not run)" in out.read_text(encoding="utf-8")
