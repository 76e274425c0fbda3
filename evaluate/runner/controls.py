"""Controls of methods that act along a direction: the same change with its sign reversed, or in random ones.

A gain that these have too is what any change of that size brings, and not what the method has learned.
"""

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from imae_jax.decode import windows
from imae_jax.decode.joint import Joint
from imae_jax.decode.methods import Method, Stream, StreamLogits, parse_method, setting_fields
from imae_jax.decode.noise import with_noise
from imae_jax.decode.streams import Models
from imae_jax.errors import UserError
from imae_jax.evaluate.benchmarks.benchmark import Item
from imae_jax.evaluate.benchmarks.harm import NEUTRAL_TEXT, STATISTICS
from imae_jax.evaluate.reporting.aggregate import choose_baseline
from imae_jax.evaluate.runner.divergence import measure
from imae_jax.evaluate.runner.passes import split_folds
from imae_jax.language_model import LanguageModel

NEUTRAL_TOKENS = 512
MATCHING_STEPS, MATCHING_TOLERANCE = 6, 0.1
# How much more than the other one sign may change neutral text before the run warns.
UNEVEN = 2.0
KL = STATISTICS.index("kl")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Controls:
    """Labels of the control runs of a method.

    Attributes:
        flip: reversed sign.
        noise: random directions that change neutral text as much.
        twins: the method with other training seeds.
        placebo: the same method, learned from what holds nothing to learn; None where none is given.
        centred: whether base mode lies half-way between method and flip, see `Method.flipped`.
        kl: KL(base ‖ stream) on neutral text, nats a token, of the method and its controls by label, as far
            as they act in a stream of the model itself; `match_sizes` fills it in.
    """

    flip: str
    noise: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()
    placebo: str | None = None
    centred: bool = True
    kl: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def labels(self) -> tuple[str, ...]:
        return (self.flip, *self.noise, *self.twins, *([self.placebo] if self.placebo else []))


def with_controls(
    methods: Mapping[str, Method], args: argparse.Namespace, *, needs_base: bool
) -> tuple[dict[str, Method], dict[str, Controls]]:
    """Methods and their control runs by label, and which are whose.

    Args:
        methods: those of --methods.
        args: of `arguments.add_control_arguments`.
        needs_base: whether gains are measured from base mode, which then must be among the methods.

    Raises:
        UserError: nothing is to be controlled, or a control is given for no method.
    """
    if args.controls is None:
        if args.placebo or args.twin:
            raise UserError("--placebo and --twin go together with --controls: pass it, too")
        return dict(methods), {}
    directed = {
        label: method
        for label, method in methods.items()
        if method.flipped() is not None and getattr(method, "noise", None) is None
    }
    if not directed:
        raise UserError(f"--controls: none of {', '.join(methods)} acts along a direction: leave it out")
    if needs_base:
        base_label(methods)
    placebos, twins = (_given(name, getattr(args, name), directed) for name in ("placebo", "twin"))
    extended, controls = dict(methods), {}
    for label, method in directed.items():
        if len(placebos.get(label, [])) > 1:
            raise UserError(f"--placebo {label} is given twice: give one")
        has_noise = any(field.name == "noise" for field in setting_fields(type(method)))
        noise = {
            f"{label}/noise-{i}": dataclasses.replace(method, noise=i)
            for i in range(args.controls if has_noise else 0)
        }
        twin = {f"{label}/twin-{i}": each for i, each in enumerate(twins.get(label, []))}
        placebo = {f"{label}/placebo": each for each in placebos.get(label, [])}
        runs = {f"{label}/flip": method.flipped(), **noise, **twin, **placebo}
        clash = next((name for name in runs if name in methods), None)
        if clash is not None:
            raise UserError(f"method {clash!r} has the label of a control: give it another")
        extended |= runs
        controls[label] = Controls(
            f"{label}/flip", tuple(noise), tuple(twin), next(iter(placebo), None), method.centred
        )
    return extended, controls


@dataclasses.dataclass(frozen=True)
class _Alone(Method):
    """The distribution of one forward pass."""

    stream: Stream
    name = "stream"

    @property
    def streams(self) -> tuple[Stream, ...]:
        return (self.stream,)

    def scores(self, logits: Sequence[StreamLogits]) -> jax.Array:
        return jax.nn.log_softmax(logits[0].final)


def match_sizes(
    lm: LanguageModel,
    methods: Mapping[str, Method],
    controls: Mapping[str, Controls],
    items: Sequence[Item],
    recorded: Mapping[str, Any],
) -> tuple[dict[str, Method], dict[str, Controls]]:
    """Scales random directions so that they change neutral text as much as the learned ones do.

    At a learned direction's length a random one does next to nothing, and would be a control of nothing. The
    divergence is of the stream in which the direction acts: that of a contrast's scores can have any size.

    Args:
        lm: the model.
        methods: methods and their controls.
        controls: which are whose.
        items: of the run; a method that has a file for each fold is measured with the first.
        recorded: `run.json` of a run to be resumed, whose scales stay; empty for a new one.

    Returns:
        The methods, those with noise with their `noise_scale`, and the controls with their `kl`. Both without
        noise where a direction lies in a second model.
    """
    matched, measured = dict(methods), {}
    for label, runs in controls.items():
        before = recorded.get("controls", {}).get(label)
        if before is None:
            scales, kl = _match(lm, methods, label, runs, items)
        else:
            settings = recorded["methods"]
            scales = {name: settings[name].get("noise_scale", 1.0) for name in runs.noise if name in settings}
            kl = before
        for name in runs.noise:
            if name in scales:
                matched[name] = dataclasses.replace(methods[name], noise_scale=scales[name])
            else:
                del matched[name]
        noise = tuple(name for name in runs.noise if name in scales)
        measured[label] = dataclasses.replace(runs, noise=noise, kl=kl)
        sizes = [kl[name] for name in (label, runs.flip) if kl.get(name)]
        if len(sizes) == 2 and max(sizes) > UNEVEN * min(sizes) and runs.centred:
            logger.warning(
                "%s and its reversed sign change neutral text by %.3g and %.3g nats a token: the split of "
                "its gain compares changes of different size",
                label,
                *sizes,
            )
    return matched, measured


def _match(
    lm: LanguageModel, methods: Mapping[str, Method], label: str, runs: Controls, items: Sequence[Item]
) -> tuple[dict[str, float], dict[str, float]]:
    """Scales of a method's random directions, and the divergences of the method and all of its controls."""
    tokens = lm.tokenizer(NEUTRAL_TEXT.read_text(encoding="utf-8"))["input_ids"]
    (window, *_) = windows(tokens, min(NEUTRAL_TOKENS, lm.config.max_position_embeddings))

    def divergence(models: Models, stream: Stream) -> float:
        joint = Joint((_Alone(stream),))
        ((_, (values,)),) = measure(lm, models, joint, {0: window}, len(window.tokens))
        return float(values[KL].mean())

    def scaled(models: Models, stream: Stream, seed: int, scale: float) -> float:
        noisy = with_noise(models.weights[0], [stream], seed, scale)
        return divergence(dataclasses.replace(models, weights=(noisy, *models.weights[1:])), stream)

    scales: dict[str, float] = {}
    kl: dict[str, float] = {}
    for name in (label, *runs.labels()):
        ((method, _), *_) = split_folds(methods[name], items)
        seed = getattr(method, "noise", None)
        learned = method if seed is None else dataclasses.replace(method, noise=None)
        models, resolved = lm.prepare(learned, generating=False)
        # On neutral text, which has no prompt, vectors act at every position.
        acting = [
            dataclasses.replace(s, steer_scope="all") for s in resolved.streams if s.model == 0 and s.acts
        ]
        if not acting:
            continue
        if seed is None:
            kl[name] = divergence(models, acting[0])
            continue
        scale, target = 1.0, kl[label]
        reached = scaled(models, acting[0], seed, scale)
        for _ in range(MATCHING_STEPS):
            if not reached or not target or abs(reached / target - 1) < MATCHING_TOLERANCE:
                break
            # The divergence grows with the square of a small change.
            scale = float(f"{scale * (target / reached) ** 0.5:.3g}")
            reached = scaled(models, acting[0], seed, scale)
        else:
            logger.warning(
                "%s changes neutral text by %.3g nats a token, %s by %.3g: no scale brought them nearer",
                *(name, reached, label, target),
            )
        scales[name], kl[name] = scale, reached
    return scales, kl


def base_label(methods: Mapping[str, Method]) -> str:
    """Label of base mode, which gains are measured from."""
    settings = {label: method.settings() for label, method in methods.items()}
    label = choose_baseline(settings, None)
    if methods[label].flipped() is not None or settings[label].get("name") != "imae":
        raise UserError("--controls measures gains over base: add base to --methods")
    return label


def _given(name: str, entries: list[str], directed: Mapping[str, Method]) -> dict[str, list[Method]]:
    """Methods of `LABEL=METHOD`, by label."""
    given: dict[str, list[Method]] = {}
    for entry in entries:
        # A label may hold `=` itself: `icd:anti_expert=DIR`.
        label = next((label for label in directed if entry.startswith(f"{label}=")), None)
        if label is None:
            raise UserError(
                f"--{name} {entry}: give LABEL=METHOD with a label of {', '.join(directed) or 'no method'}"
            )
        given.setdefault(label, []).append(parse_method(entry.removeprefix(f"{label}=")))
    return given
