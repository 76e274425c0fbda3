"""Curves of a training run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

LOSSES = {"anti": "L_anti", "expert": "L_expert", "gate": "L_gate", "keep": "L_keep"}
GATES = {"gate_on_fact": "gate on T_fact", "gate_off_fact": "gate off T_fact"}
MODES = {
    "base": "base",
    "expert": "expert",
    "anti_expert": "anti-expert",
    "anti_expert_llm": "anti-expert LLM",
    "right_llm": "right-answer LLM",
}
ANSWERS = {
    "right": "log p of right answers' tokens",
    "wrong": "log p of wrong answers' tokens",
    "margin": "log p(right) − log p(wrong)",
    "wins": "share of pairs where right wins",
}
# What held-out rows give of every mode, by its name in evaluation.jsonl.
MEASURES = {
    f"{key}_{mode}": f"{label}, {name}" for key, label in ANSWERS.items() for mode, name in MODES.items()
}


def training_plot(
    lines: Sequence[dict[str, Any]], path: Path | BinaryIO, evaluations: Sequence[dict[str, Any]] = ()
) -> None:
    """The losses and the mean gate against the step, and what was measured on held-out rows.

    Args:
        lines: those of metrics.jsonl.
        path: PNG file to write, or an open file.
        evaluations: lines of evaluation.jsonl.
    """
    from matplotlib.figure import Figure

    names = {k: v for k, v in LOSSES.items() if k in lines[0]} or {"loss": "loss"}
    gates = {k: v for k, v in GATES.items() if any(line.get(k) for line in lines)}
    answers = {k: v for k, v in ANSWERS.items() if any(f"{k}_base" in line for line in evaluations)}
    by_layer = {k: v for k, v in gates.items() if evaluations and f"{k}_by_layer" in evaluations[-1]}
    panels = 1 + bool(gates) + len(answers) + bool(by_layer)
    figure = Figure(figsize=(4 * panels, 3.2), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])

    def curves(ax, names):
        for color, (key, label) in enumerate(names.items()):
            ax.plot([e["step"] for e in lines], [e[key] for e in lines], f"C{color}", lw=1, label=label)
            if evaluations:
                ax.plot([e["step"] for e in evaluations], [e[key] for e in evaluations], f"oC{color}", ms=4)
        if evaluations:
            ax.plot([], [], "ok", ms=4, label="held out")

    ax = next(axes)
    curves(ax, names)
    ax.set(xlabel="step", ylabel="loss (nats)", ylim=(0, None))
    if gates:
        ax = next(axes)
        curves(ax, gates)
        ax.set(xlabel="step", ylabel="mean gate", ylim=(0, 1))
    for answer, ylabel in answers.items():
        ax = next(axes)
        for mode, label in MODES.items():
            # An earlier version did not measure all of it.
            points = [(e["step"], e[key]) for e in evaluations if (key := f"{answer}_{mode}") in e]
            if points:
                ax.plot(*zip(*points, strict=True), "o-", ms=4, label=label)
        ax.set(xlabel="step", ylabel=ylabel)
    if by_layer:
        ax = next(axes)
        for key, label in by_layer.items():
            values = evaluations[-1][f"{key}_by_layer"]
            ax.plot(range(1, len(values) + 1), values, "o-", ms=3, label=label)
        ax.set(xlabel="layer", ylabel="gate, held-out rows, last step", ylim=(0, 1))
    for ax in figure.axes:
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
