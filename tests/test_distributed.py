"""Several processes on this machine (gloo collectives) are one run: same losses, a common end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import losses_of
from helpers.training import HELD_OUT, evaluations

from imae_jax import distributed
from imae_jax.convert import load_model
from imae_jax.files import locked

pytestmark = pytest.mark.multiprocess

DEVICES = 4
ICD = [
    *("icd.enabled=true", "icd.lora.rank=4", "icd.batch_size=8", "icd.epochs=null", "icd.optimizer.steps=3"),
    *("icd.optimizer.learning_rate=2e-2", "filter.gamma=0.1"),
]


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(count: int, settings: list[str], module: str = "imae_jax.train") -> list[subprocess.Popen]:
    """The processes of a run, which share `DEVICES` virtual devices."""
    address = free_address()
    devices = f"--xla_force_host_platform_device_count={DEVICES // count}"
    # Every process compiles: what it compiles to is not what these tests are about.
    environment = os.environ | {"XLA_FLAGS": f"{devices} --xla_backend_optimization_level=0"}
    # Nor may one compile while another, which has its program from a cache, waits: gloo gives it 30 s.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    # On a busy machine a process that lives may be silent for minutes; a dead one breaks its connections.
    command = [sys.executable, "-m", module, *settings, "--heartbeat-timeout", "600"]
    together = ["--coordinator", address, "--num-processes", str(count), "--process-id"] if count > 1 else []
    return [
        subprocess.Popen(
            [*command, *(together and [*together, str(i)])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of every process; the library of CPUs' collectives prints there, too."""
    ended = []
    try:
        for process in processes:
            output, error = process.communicate()
            # Its threads write over each other: parts of a line may stand alone.
            lines = output.splitlines(keepends=True)
            ours = [line for line in lines if "[Gloo]" not in line and "peer ranks" not in line]
            ended.append((process.returncode, "".join(ours), error))
        return ended
    finally:
        for process in processes:
            process.kill()


def in_directory(settings: list[str], out: Path) -> list[str]:
    return [f"out={out}" if s.startswith("out=") else s for s in settings]


def assert_same_losses(actual: list[dict], expected: list[dict]) -> None:
    """Up to the order in which collectives add up float32 numbers."""
    assert [line.keys() for line in actual] == [line.keys() for line in expected]
    for a, b in zip(actual, expected, strict=True):
        for name, value in b.items():
            if value is None:
                assert a[name] is None, name
            else:
                assert a[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_processes_give_the_same_losses_as_one(settings, tmp_path):
    """All three stages; rows and weights lie across processes."""
    settings = [*settings, *HELD_OUT, "mesh.fsdp=4", *ICD]
    one, several = tmp_path / "one", tmp_path / "several"
    ((code, _, error),) = finish(start(1, in_directory(settings, one)))
    assert code == 0, error
    results = finish(start(2, in_directory(settings, several)))
    for code, _, error in results:
        assert code == 0, error
    for stage in (".", "icd"):
        assert_same_losses(losses_of(several / stage), losses_of(one / stage))
    assert_same_losses(evaluations(several), evaluations(one))
    # Process 0 alone talks.
    talks = [("wrote" in out, "data:" in error) for _, out, error in results]
    assert talks == [(True, True), (False, False)]
    units = [load_model(str(path / "imae")).model.weights().units for path in (one, several)]
    for a, b in zip(*map(jax.tree.leaves, units), strict=True):
        # Adam divides by the root of squared gradients: where those vanish, the order of sums shows.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_killed_process_ends_the_others_and_a_resume_works(settings, tmp_path):
    """First the one that only takes part, then the one that the others meet at; a signal ends it."""
    out = tmp_path / "run"
    settings = [*(s for s in settings if not s.startswith("optimizer.steps")), "optimizer.steps=400"]
    settings += ["mesh.data=2", "mesh.fsdp=2"]

    def start_and_wait(before: list[dict], *arguments: str) -> list[subprocess.Popen]:
        """Two processes, when they have saved, done more steps than `before`, and the same."""
        processes = start(2, [*settings, *arguments])
        count = max(len(before) + 1, 5)
        while not (any(out.glob("checkpoints/[0-9]*")) and len(losses_of(out)) >= count):
            assert all(p.poll() is None for p in processes), finish(processes)
            time.sleep(0.01)
        assert_same_losses(losses_of(out)[: len(before)], before)
        return processes

    before, arguments = [], []
    for victim in (1, 0):
        processes = start_and_wait(before, *arguments)
        processes[victim].kill()
        code, _, error = finish(processes)[1 - victim]
        assert code != 0, error
        before, arguments = losses_of(out), ["--resume"]
    # A signal to one of them stops both at the same step, saved.
    processes = start_and_wait(before, *arguments)
    processes[1].send_signal(signal.SIGTERM)
    for code, _, error in finish(processes):
        assert code == 128 + signal.SIGTERM, error
        assert "saved in" in error


SIGNALLED = """
import os, sys
from imae_jax import distributed
from imae_jax.train.preemption import stop_signals
address, process, number = sys.argv[1], *map(int, sys.argv[2:])
distributed.initialize(address, 2, process)
with distributed.end_together():
    for signalled in (1, 0):
        with stop_signals() as stop:
            for step in range(9):
                distributed.barrier("step")
                if step == 3 and process == signalled:
                    os.kill(os.getpid(), number)
                if stopped := stop():
                    print(f"process {process}: {stopped} after step {step}", flush=True)
                    break
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_one_process_stops_all_at_the_same_step(number):
    address = free_address()
    arguments = [[address, str(process), str(int(number))] for process in range(2)]
    results = finish(
        [
            subprocess.Popen(
                [sys.executable, "-c", SIGNALLED, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for words in arguments
        ]
    )
    for process, (code, output, error) in enumerate(results):
        assert code == 0, error
        assert output == 2 * f"process {process}: {int(number)} after step 4\n"


def test_processes_evaluate_as_one(scored, tmp_path):
    """Rows and weights lie across processes; process 0 writes and talks. A run goes on, on both."""
    command, expected = [*map(str, scored[0])], scored[1]
    out = tmp_path / "out"
    command[command.index("--out") + 1] = str(out)
    command += ["--mesh", "data=4"]

    def run(*arguments):
        results = finish(start(2, [*command, *arguments], "imae_jax.evaluate.truthfulqa"))
        assert [code for code, _, _ in results] == [0, 0], results
        assert ["MC1" in output for _, output, _ in results] == [True, False]
        assert results[1][2] == ""
        lines, of_one = (
            [json.loads(line) for line in (path / "scores.jsonl").read_text().splitlines()]
            for path in (out, expected)
        )
        assert len(lines) == len(of_one) > 0
        for line, one in zip(lines, of_one, strict=True):
            assert (line["index"], line["method"]) == (one["index"], one["method"])
            scores, expected_scores = (x["true"] + x["false"] for x in (line, one))
            # Raw contrasts hold masks of -1000.
            np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-3)
        return json.loads((out / "results.json").read_text())

    assert run("--quiet")["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    (out / "results.json").unlink()
    lines = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    (out / "scores.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    assert run("--quiet", "--resume")["resumed_lines"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_processes_generate_as_one(checkpoint, tmp_path):
    command = ["--model", str(checkpoint.directory), "--max-new-tokens", "4"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"t{i} t5"}) + "\n" for i in range(3, 6)))
    outputs = []
    for count, mesh in ((1, []), (2, ["--mesh", "tensor=2"])):
        results = finish(start(count, [*command, *mesh, "--prompt", "t5 t6"], "imae_jax.generate"))
        assert all(code == 0 for code, _, _ in results), results
        assert [output for _, output, _ in results[1:]] == [""] * (count - 1)
        out = tmp_path / f"{count}.jsonl"
        files = ["--prompts", str(prompts), "--out", str(out)]
        results += finish(start(count, [*command, *mesh, *files], "imae_jax.generate"))
        assert all(code == 0 for code, _, _ in results), results
        outputs.append((results[0][1], out.read_text()))
    assert outputs[0] == outputs[1]


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: documents.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{' ' + target}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_processes_run_the_harness_as_one(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from imae_jax.evaluate.lm_eval import IMAEJaxLM

    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TASK)
    texts = [(f"t{i} t5", f" t{i} t7") for i in range(3, 9)]
    documents = (json.dumps({"text": text, "target": target.strip()}) for text, target in texts)
    (tmp_path / "documents.jsonl").write_text("\n".join(documents))
    command = ["--model", checkpoint.directory, "--mesh", "data=4", "--tasks", "tiny", "--include-path", "."]
    command += ["--log-samples", "--out", "out"]
    results = finish(start(2, [*map(str, command)], "imae_jax.evaluate.lm_eval"))
    assert [code for code, _, _ in results] == [0, 0], results
    assert ["tiny" in output for _, output, _ in results] == [True, False]
    samples = map(json.loads, (tmp_path / "out" / "samples_tiny.jsonl").read_text().splitlines())
    actual = [float(sample["resps"][0][0][0]) for sample in samples]
    requests = [Instance("loglikelihood", {}, text, i, ("tiny", i, 1)) for i, text in enumerate(texts)]
    expected = IMAEJaxLM(checkpoint.load()).loglikelihood(requests, disable_tqdm=True)
    assert actual == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_an_error_of_an_evaluation_ends_all_processes(scored):
    command = [*map(str, scored[0]), "--overwrite", "--mesh", "tensor=3"]
    results = finish(start(2, command, "imae_jax.evaluate.truthfulqa"))
    for i, (code, _, error) in enumerate(results):
        assert code == 2
        assert (
            f"error: process {i} of 2: mesh data=1 fsdp=1 tensor=3 needs 3 devices but there are 4" in error
        )


def test_a_second_run_is_refused_in_all_its_processes(settings, tmp_path):
    """By the main one, which alone takes the lock."""
    with locked(tmp_path / "run"):
        for i, (code, _, error) in enumerate(finish(start(2, settings))):
            assert code == 2
            assert error.splitlines()[-1].startswith(
                f"error: process {i} of 2: {tmp_path / 'run'} is being written"
            )
    assert not (tmp_path / "run").exists()


def test_addresses_go_together(settings):
    ((code, _, error),) = finish(start(1, [*settings, "--coordinator", "localhost:1"]))
    assert code == 2
    assert error == "error: --coordinator, --num-processes and --process-id go together\n"


def test_one_process_is_no_cluster(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    distributed.initialize()
    assert jax.process_count() == 1
    assert distributed.is_main()
