"""The units that the package ships load by name and score what their card says of the demo questions."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from imae_jax.convert import load_model
from imae_jax.convert.references import SHIPPED_UNITS
from imae_jax.evaluate.truthfulqa import main

NAME = "imae-smollm2-135m"
MODES = {"base": "base", "expert": "expert", "anti-expert": "anti-expert", "strength −2": "-2"}


def test_they_are_small_and_load_by_name(smollm2):
    files = [path for path in SHIPPED_UNITS[NAME].iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4e6
    lm = load_model(NAME)
    assert lm.base.fingerprint == smollm2.base.fingerprint
    assert {array.dtype for array in jax.tree.leaves(lm.model.weights())} == {jnp.dtype(jnp.float32)}
    assert repr(lm) == "<LanguageModel smollm2-135m-instruct, 30 layers, float32, units of 32>"
    answer = ["What is a young swan called?", [" A cygnet."]]
    base, expert, anti_expert = (lm.score(*answer, mode) for mode in ("base", "expert", "anti-expert"))
    assert base == smollm2.score(*answer)
    assert len({*base, *expert, *anti_expert}) == 3


@pytest.mark.slow
def test_their_card_has_what_the_demo_questions_give(smollm2, tmp_path):
    """Rounding differs between processors, and may turn a question whose answers are all but equal."""
    card = (SHIPPED_UNITS[NAME] / "README.md").read_text(encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["--model", NAME, "--data", "demo", "--protocol", "tqa-v1/chat"]
    assert main([*arguments, f"--methods={','.join(MODES.values())}", "--out", str(out), "--quiet"]) == 0
    found = json.loads((out / "results.json").read_text())
    one_question = 100 / found["n_questions"] + 0.006
    for mode, method in MODES.items():
        (row,) = re.findall(rf"^\| {mode} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
        means = [found["methods"][method][name] for name in ("mc1", "mc2", "mc3")]
        for value, mean, tolerance in zip(row, means, (one_question, 0.1, one_question), strict=True):
            assert mean == pytest.approx(float(value), abs=tolerance)
