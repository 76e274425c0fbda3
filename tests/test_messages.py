"""What commands say on stderr: errors, warnings, notes, progress bars."""

import logging
import sys

import jax.numpy as jnp
import pytest
from conftest import error_of, run_python
from tqdm import tqdm

from imae_jax.cli import ArgumentParser, command
from imae_jax.errors import UserError
from imae_jax.generate import main as generate


@command
def example(argv):
    """A command that does what its argument says."""
    parser = ArgumentParser(prog="example")
    parser.add_argument("what")
    what = parser.parse_args(argv).what
    if what == "mistake":
        try:
            {}["key"]
        except KeyError as error:
            raise UserError("a file has\nno key") from error
    if what == "fault":
        {}["key"]
    if what == "memory":
        jnp.zeros(2**60, jnp.int8)
    if what == "fault after memory":
        try:
            jnp.zeros(2**60, jnp.int8)
        except Exception:
            {}["key"]
    if what == "log":
        for name in ("imae_jax.module", "library"):
            logger = logging.getLogger(name)
            for level in (logging.DEBUG, logging.INFO, logging.WARNING):
                logger.log(level, "a\nmessage")
    if what == "bar":
        for _ in tqdm(range(2), file=sys.stderr, mininterval=0):
            logging.getLogger("imae_jax").info("a note")


def test_a_users_mistake_is_one_line(capfd):
    assert error_of(capfd, example, "mistake") == "error: a file has no key"


@pytest.mark.parametrize("way", ["option", "environment"])
def test_debug_shows_what_led_to_a_mistake(capfd, monkeypatch, way):
    if way == "environment":
        monkeypatch.setenv("IMAE_JAX_DEBUG", "1")
    assert example(["mistake", *["--debug"] * (way == "option")]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "KeyError: 'key'" in lines
    assert lines[-1] == "error: a file has no key"
    monkeypatch.delenv("IMAE_JAX_DEBUG", raising=False)
    error_of(capfd, example, "mistake")


@pytest.mark.parametrize("what", ["fault", "fault after memory"])
def test_our_fault_is_a_traceback_that_says_so(capfd, what):
    assert example([what]) == 1
    *traceback, last = capfd.readouterr().err.splitlines()
    assert traceback[0] == "Traceback (most recent call last):"
    assert traceback[-1] == "KeyError: 'key'"
    assert "fault of imae_jax" in last and "report" in last


def test_too_little_memory_is_nobodys_fault(capfd):
    assert "out of memory" in error_of(capfd, example, "memory")


@pytest.mark.parametrize("arguments", [[], ["mistake", "--unknown"], ["--quiet=yes", "mistake"]])
def test_wrong_arguments_are_one_line(capfd, arguments):
    assert error_of(capfd, example, *arguments).endswith("(see example --help)")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["-q"], ["warning: a message", "warning: library: a message"]),
        ([], ["a message", "warning: a message", "warning: library: a message"]),
        (
            ["-v"],
            [
                *("debug: a message", "a message", "warning: a message"),
                *("library: a message", "warning: library: a message"),
            ],
        ),
    ],
    ids=["quiet", "plain", "verbose"],
)
def test_how_much_is_said(capfd, options, expected):
    # Before the other argument and after it.
    for arguments in ([*options, "log"], ["log", *options]):
        assert example(arguments) == 0
        output = capfd.readouterr()
        assert output.err.splitlines() == expected
        assert output.out == ""


def test_the_library_configures_no_logging(capfd):
    before = [logging.getLogger().handlers[:], logging.getLogger().level]
    assert example(["log", "-v"]) == 0
    assert before == [logging.getLogger().handlers, logging.getLogger().level]
    assert logging.getLogger("imae_jax").level == logging.NOTSET
    assert not logging.getLogger("imae_jax").handlers


def test_messages_stay_apart_from_progress_bars(capfd):
    assert example(["bar"]) == 0
    # What a terminal shows: a carriage return begins the line anew.
    shown = [line.split("\r")[-1] for line in capfd.readouterr().err.split("\n")]
    assert shown[:2] == ["a note", "a note"]
    assert "2/2" in shown[2]


def test_every_command_takes_the_options(tmp_path, tiny):
    """As a user runs them; what is the result stays on stdout."""
    command = ["-m", "imae_jax.generate", "--model", tiny("gqa").directory, "--prompt", "t5 t6"]
    plain = run_python([*command, "--max-new-tokens", "2"], tmp_path)
    quiet = run_python([*command, "--max-new-tokens", "2", "-q"], tmp_path)
    assert plain.returncode == quiet.returncode == 0
    assert "compilation included" in plain.stderr
    assert (quiet.stdout, quiet.stderr) == (plain.stdout, "")
    wrong = run_python([*command, "--seed", "-1", "--debug"], tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("Traceback")
    assert wrong.stderr.splitlines()[-1].startswith("error: --seed -1")


def test_options_are_of_subcommands_too(capfd, tmp_path):
    from imae_jax.convert.__main__ import main as convert

    for arguments in (["--debug", "export"], ["export", "--debug"]):
        assert convert([*arguments, "--model", "nowhere", "--out", str(tmp_path / "out")]) == 2
        assert capfd.readouterr().err.startswith("Traceback")
    assert error_of(capfd, generate, "--model", "nowhere", "--prompt", "t5").startswith("error: ")
