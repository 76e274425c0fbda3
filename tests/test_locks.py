"""One process at a time writes to an output."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import error_of, losses_of, user_error, with_changes

from imae_jax.__main__ import COMMANDS
from imae_jax.__main__ import main as every_command
from imae_jax.evaluate.truthfulqa import main as truthfulqa
from imae_jax.files import locked
from imae_jax.generate import main as generate
from imae_jax.train.__main__ import main as train

HOLD = """
import sys
from imae_jax.files import locked

with locked(sys.argv[1]):
    print(flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(path):
    """Another process that holds an output's lock, and is killed in the end."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"\n"
            yield holder
        finally:
            holder.kill()


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_second_process_is_refused_and_the_first_leaves_nothing_behind(tmp_path):
    out = tmp_path / "new" / "out"
    with held(out) as holder:
        with user_error(f"{out} is being written by another process"), locked(out):
            pass
        holder.stdin.close()
        assert holder.wait() == 0
        assert names(tmp_path) == []
    with locked(out):
        pass
    assert names(tmp_path) == []


def test_a_lock_goes_with_a_process_that_is_killed(tmp_path):
    with held(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        # By whatever name the output is called.
        (tmp_path / "link").symlink_to(tmp_path)
        with user_error("is being written"), locked(tmp_path / "link" / "out"):
            pass
    assert names(tmp_path) == ["link"]


def test_an_evaluation_waits_for_nobody(scored, tmp_path, capfd):
    """Neither a new run nor one that goes on, and an output is replaced when its writer has gone."""
    command, finished = scored
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "results.json").unlink()
    content = {path.name: path.read_bytes() for path in out.iterdir()}
    command = with_changes(command, out=out)
    with held(out):
        for more in ([], ["--resume"], ["--overwrite"]):
            assert f"{out} is being written by another" in error_of(capfd, truthfulqa, *command, *more)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == content
    assert truthfulqa([*map(str, command), "--overwrite", "-q"]) == 0
    assert names(tmp_path) == ["out"]
    assert names(out) == names(finished)


def test_generated_lines(checkpoint, tmp_path, capfd):
    (tmp_path / "in.jsonl").write_text('{"prompt": "t5"}\n')
    command = ["--model", checkpoint.directory, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out"]
    with held(tmp_path / "out"):
        assert "is being written" in error_of(capfd, generate, *command)
    assert generate([*map(str, command), "--max-new-tokens", "2"]) == 0
    assert json.loads((tmp_path / "out").read_text())["prompt"] == "t5"
    assert names(tmp_path) == ["in.jsonl", "out"]


@pytest.mark.multiprocess
def test_two_trainings(settings, tmp_path, capfd):
    """The second is refused while the first runs, and goes on where that was killed."""
    out = tmp_path / "run"
    long = [s.replace("save_every=3", "save_every=1000").replace("steps=8", "steps=400") for s in settings]
    first = subprocess.Popen([sys.executable, "-m", "imae_jax.train", *long, "-q"])
    try:
        while not (out / "metrics.jsonl").exists() or not losses_of(out):
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # It must not end before the second has begun.
        for more in ([], ["--resume"], ["--overwrite"]):
            assert f"{out} is being written by another" in error_of(capfd, train, *long, *more)
    finally:
        first.kill()
        first.wait()
    assert train([*long, "--resume", "-q"]) == 0
    assert len(losses_of(out)) == 400
    assert names(tmp_path) == ["rows.jsonl", "run"]


# Their models do not exist, which would be said first if they were loaded first.
WRITERS = (
    "generate --model nowhere --prompts nowhere --out {}",
    "train model=nowhere out={}",
    "convert export --model nowhere --out {}",
    "convert import --model nowhere --out {}",
    "convert checkpoint --run nowhere --out {}",
    "convert mode --model nowhere --mode base --out {}",
    "evaluate truthfulqa --model nowhere --out {}",
    "evaluate halueval --model nowhere --out {}",
    "evaluate harm --model nowhere --out {}",
    "evaluate answers --model nowhere --out {}",
    "evaluate lm_eval --model nowhere --tasks any --include-path nowhere --out {}",
    "evaluate all --model nowhere --data nowhere --out {}",
    "evaluate compare nowhere nowhere --out {}",
    "evaluate report nowhere --out {}",
    "evaluate cost -q --model nowhere --out {}",
    "evaluate cost -q --model nowhere --out other --profile {}",
    "evaluate inspector --model nowhere --text text --html {}",
    "evaluate iti --model nowhere --out {}",
    "evaluate steer --model nowhere --out {}",
)


@pytest.mark.parametrize("line", WRITERS)
def test_every_command_that_writes_is_refused_before_it_begins(line, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("t5 t6")
    out = tmp_path / "out"
    with locked(out):
        error = error_of(capfd, every_command, *line.format(out).split())
        assert error.startswith(f"error: {out} is being written by another process")
        assert names(tmp_path) == [".out.lock", "text"]
    # Alone it comes further, and leaves nothing behind.
    assert "nowhere" in error_of(capfd, every_command, *line.format(out).split())
    assert names(tmp_path) == ["text"]


def test_no_command_that_writes_is_missing_above():
    listed = {max((name for name in COMMANDS if line.startswith(name)), key=len) for line in WRITERS}
    assert listed == COMMANDS.keys() - {"train plan", "train pairs", "serve"}


def test_an_output_in_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with user_error("cannot be written in", "choose another output"), locked(tmp_path / "file" / "out"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files, not even root's")
def test_an_output_where_nothing_can_be_written_is_refused_at_once(capfd):
    for out in ("/proc/out", "/proc/new/out"):
        command = ["--model", "nowhere", "--out", out]
        assert f"{out} cannot be written in" in error_of(capfd, truthfulqa, *command)


def test_where_no_lock_can_be_made_a_warning_says_so(tmp_path, caplog):
    out = tmp_path / ("x" * 252)  # Of the longest names a file system takes: the lock's is longer.
    with locked(out):
        assert f"{out} cannot be locked" in caplog.text
