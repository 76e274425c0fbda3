"""`python -m imae_jax.evaluate.lm_eval`: tasks of the LM Evaluation Harness with any mode or decoding method.

What a request means (how a text splits into context and continuation, what is cut where it is too long, the
windows of a rolling log-likelihood, where generated text ends) is as in the harness's own backend for
HuggingFace models, `lm_eval.models.huggingface`, version 0.4.13 (https://github.com/EleutherAI/lm-evaluation-harness).
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from imae_jax import runtime
from imae_jax.chat_template import ChatTemplateError
from imae_jax.cli import (
    ArgumentParser,
    add_model_arguments,
    add_process_arguments,
    at_least,
    command,
    join_processes,
    lock_outputs,
    model_arguments,
)
from imae_jax.distributed import is_main
from imae_jax.errors import UserError, first_line
from imae_jax.evaluate.reporting.harness import HARNESS_COLUMNS, HARNESS_FILE, harness_rows
from imae_jax.evaluate.reporting.tables import Table, show
from imae_jax.files import new_directory
from imae_jax.prompts import resolve_format

try:
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError:
    TemplateLM = object  # `check_packages` says what to install.

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from imae_jax.decode import Continuation, Method
    from imae_jax.decode.loop import GenerationOptions
    from imae_jax.language_model import LanguageModel

BATCH_SIZE, MAX_NEW_TOKENS = 8, 256


class IMAEJaxLM(TemplateLM):
    """A model of the harness that runs a mode or decoding method: `lm_eval.simple_evaluate(model=…)`.

    A log-likelihood is the sum of the method's scores, which are log-probabilities for the modes of a model
    alone: what a task makes of it as a probability (perplexities, MC2) holds for those only.

    Args:
        lm: model of `imae_jax.convert.load_model`.
        method: mode or decoding method, as in `LanguageModel.generate`.
        batch_size: texts that are generated together (default: 8), and rows that are scored together
            (default: by platform).
        max_length: the most tokens of a context; longer ones lose their beginning. Default: what the model,
            and a method's second one, were trained for.
        add_bos_token: whether texts begin with BOS; default: as the tokenizer does.
        seed: seed of the sampler.
        quiet: no progress bars.

    Raises:
        UserError: a method that the model cannot run, or a setting out of its range.
    """

    def __init__(
        self,
        lm: "LanguageModel",
        method: "str | Method" = "base",
        *,
        batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
        quiet: bool = False,
    ):
        check_packages()
        super().__init__()
        self.lm, self.tokenizer, self.method = lm, lm.tokenizer, method
        self._scored = lm.prepare(method, generating=False)
        self._generated = lm.prepare(method, generating=True)
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch size {batch_size}: give at least 1")
        limit = self._scored[0].max_positions
        if max_length is not None and not 1 <= max_length <= limit:
            raise UserError(f"max length {max_length}: the context of the model is {limit}")
        self.batch_size, self.max_length = batch_size, max_length or limit
        self.add_bos_token, self.seed, self.quiet = add_bos_token, seed, quiet

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name of the harness's cache of requests, which hold what the chat template made of a task."""
        name = self.lm.base.reference
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()
        return f"{Path(name).name}-{template[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results beside its own settings."""
        return {
            "model": self.lm.base.reference,
            "imae_jax": {
                "base_model": dataclasses.asdict(self.lm.base),
                "anti_expert": self.lm.imae and self.lm.imae["anti_expert"],
                "method": {
                    "scoring": self._scored[1].settings(),
                    "generating": self._generated[1].settings(),
                },
                "max_length": self.max_length,
                "add_bos_token": self.add_bos_token,
                "seed": self.seed,
                "versions": runtime.versions(),
                "git": runtime.git_state(),
            },
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except ChatTemplateError:
            # Some templates have no place for a system message.
            return render([message for message in chat_history if message["role"] != "system"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            # A chat template has written BOS already.
            if string.startswith(self.tokenizer.decode([self.prefix_token_id])):
                add_special_tokens = False
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, **chosen)["input_ids"]

    def loglikelihood(
        self, requests: "list[Instance]", disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        # One task at a time: what its requests begin with is computed once.
        tasks = defaultdict(list)
        for i, request in enumerate(requests):
            tasks[request.task_name].append(i)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for indices in tasks.values():
            values = super().loglikelihood([requests[i] for i in indices], disable_tqdm)
            for i, value in zip(indices, values, strict=True):
                answers[i] = value
        return answers

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, indices = [], []
        for i, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                indices.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(indices, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            groups[self._settings(request.args[1])].append(i)
        batches = []
        for settings, indices in groups.items():
            room = self.max_length - settings[0].max_new_tokens
            prompts = {i: self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in indices}
            prompts = {i: tokens[-room:] for i, tokens in prompts.items()}
            # Longest first: rows of a batch are alike, and what exceeds the memory does so at once.
            indices = sorted(indices, key=lambda i: -len(prompts[i]))
            size = self.batch_size or BATCH_SIZE
            for start in range(0, len(indices), size):
                batches.append((settings, {i: prompts[i] for i in indices[start : start + size]}))
        texts = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or self.quiet) as bar:
            for number, ((options, stop), prompts) in enumerate(batches):
                options = dataclasses.replace(options, seed=(self.seed + number) % 2**31)
                continued = self._continue(list(prompts.values()), options, stop)
                for i, text in zip(prompts, continued, strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(len(prompts))
        return texts

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        from imae_jax.decode import score

        items, groups = [], defaultdict(list)
        for i, (texts, context, continuation) in enumerate(requests):
            items.append(self._continuation(texts, context, continuation))
            groups[tuple(context)].append(i)
        indices = list(groups.values())
        models, method = self._scored
        results = score(
            models,
            self.lm.config,
            [[items[i] for i in group] for group in indices],
            method,
            greedy=True,
            rows_per_batch=self.batch_size,
            where=lambda group, member: f"request {indices[group][member]}",
        )
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or self.quiet) as bar:
            for group, scored in results:
                for i, s, g in zip(indices[group], scored.scores, scored.is_greedy, strict=True):
                    answers[i] = float(np.sum(s, dtype=np.float64)), bool(g.all())
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(len(indices[group]))
        return answers

    def _continuation(
        self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> "Continuation":
        """What is scored, cut on the left; the last token, which predicts nothing, is not counted."""
        from imae_jax.decode import Continuation

        if not context or not continuation:
            raise UserError(f"a request without tokens in its context or its continuation: {texts!r}")
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation)} tokens, over the context of {self.max_length}: "
                "shorten it"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return Continuation(tuple(tokens), len(tokens) - len(continuation))

    def _settings(self, kwargs: dict[str, Any]) -> "tuple[GenerationOptions, tuple[str, ...]]":
        """A task's `generation_kwargs`, by the harness's own rules: options, and strings that end a text.

        Raises:
            UserError: a setting that does not exist here, or contradicts another.
        """
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        from imae_jax.decode import Sampler
        from imae_jax.decode.loop import GenerationOptions

        try:
            settings = dict(normalize_gen_kwargs(kwargs, MAX_NEW_TOKENS))
            temperature, penalty = (
                float(settings.pop(name, default))
                for name, default in (("temperature", 0.0), ("repetition_penalty", 1.0))
            )
            top_k, top_p = int(settings.pop("top_k", None) or 0), float(settings.pop("top_p", None) or 1.0)
        except (TypeError, ValueError) as error:
            raise UserError(f"generation settings {kwargs}: {first_line(error)}") from error
        stop = handle_stop_sequences(settings.pop("until"), self.tokenizer.decode([self.eot_token_id]))
        max_new_tokens, sampled = settings.pop("max_gen_toks"), settings.pop("do_sample")
        if settings.pop("num_beams", 1) != 1 or settings:
            raise UserError(
                f"generation settings {kwargs} are not all known: use until, max_gen_toks, do_sample, "
                "temperature, top_k, top_p, repetition_penalty"
            )
        if sampled and temperature == 0:
            raise UserError(f"generation settings {kwargs}: do_sample needs a temperature above 0")
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"max_gen_toks {max_new_tokens} leaves no place for a prompt in the context of "
                f"{self.max_length}: lower it with --gen-kwargs max_gen_toks=N"
            )
        sampler = Sampler(temperature, top_k, top_p, penalty) if sampled else Sampler(0.0, 0, 1.0, penalty)
        return GenerationOptions(sampler, max_new_tokens), tuple(filter(None, stop))

    def _continue(
        self, prompts: list[list[int]], options: "GenerationOptions", stop: tuple[str, ...]
    ) -> list[str]:
        from lm_eval.models.utils import postprocess_generated_text

        from imae_jax.decode.loop import stream_tokens

        models, method = self._generated
        # Special tokens do not appear in the text: they are looked for by their ids.
        special = self.tokenizer.special_ids
        stop_ids = {special[string] for string in stop if string in special}
        rows: list[list[int]] = [[] for _ in prompts]
        texts, closed = [""] * len(prompts), [False] * len(prompts)
        ends = sorted(stop_ids | set(self.lm.eos_token_ids))
        for tokens in stream_tokens(models, prompts, method, options, eos_token_ids=ends, closed=closed):
            for row, new in zip(rows, tokens, strict=True):
                row += new
            texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
            closed[:] = [any(string in text for string in stop) for text in texts]
        return [postprocess_generated_text(text, list(stop), None) for text in texts]


def check_packages() -> None:
    """Checks that the harness can be imported, and HuggingFace's `evaluate`, which its tasks import.

    Raises:
        UserError: one of them is not installed, or `import evaluate` gives this folder, as in a Python that
            was started in a checkout.
    """
    try:
        version("lm_eval"), version("evaluate")
    except PackageNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'imae_jax[lm-eval]'") from error
    spec, here = importlib.util.find_spec("evaluate"), Path(__file__).resolve().parent
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == here:
        raise UserError(
            f"`import evaluate` gives {here} instead of HuggingFace's package, which tasks of lm-eval need: "
            "start Python in another folder, or with -P"
        )


def load_tasks(
    names: Sequence[str], include_path: Path | None = None, *, unsafe: bool = False
) -> tuple[Any, list[Any]]:
    """Tasks, groups and tags of the harness by name, with their data.

    Args:
        names: names of tasks, groups or tags.
        include_path: directory with further task files.
        unsafe: whether tasks may run generated code.

    Returns:
        The harness's `TaskManager`, and the tasks that `simple_evaluate` takes.

    Raises:
        UserError: a name that does not exist, data that cannot be loaded, or a task that may not run.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no directory")
    # To read the harness's thousands of task files takes many seconds: only where a name asks for them.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"task {name!r} does not exist: give the name of a task, group or tag of lm-eval")
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # Whatever a task's own code or the hub raises.
        raise UserError(f"tasks {','.join(names)} cannot be loaded: {first_line(error)}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"task {name!r} needs more than text: choose another")
        if getattr(task, "UNSAFE_CODE", False) and not unsafe:
            raise UserError(f"task {name!r} runs generated code: allow it with --confirm-run-unsafe-code")
    children = {name for children in loaded["group_map"].values() for name in children}
    everything = loaded["groups"] | loaded["tasks"]
    return manager, [item for name, item in everything.items() if name not in children]


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    join_processes(args)
    names = [name for name in args.tasks.split(",") if name]
    if not names:
        raise UserError("--tasks names no task: give names of tasks, groups or tags of lm-eval")
    lock_outputs(args.out)
    # In a checkout the working directory has a folder `evaluate`, too: it must come last.
    checkout = Path(__file__).resolve().parents[1]
    sys.path.sort(key=lambda entry: Path(entry).resolve() == checkout)
    check_packages()
    with new_directory(args.out, marker=HARNESS_FILE, overwrite=args.overwrite) as out:
        results = _evaluate(args, names)
        if not is_main():  # There the harness may keep its results back.
            return
        _write(out, results)
    show([Table(f"lm-eval, {args.model}, {args.method}", HARNESS_COLUMNS, tuple(harness_rows(results)))])


def _evaluate(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The harness's results on tasks of these names, with the command's arguments."""
    import lm_eval

    from imae_jax.convert import load_model
    from imae_jax.decode import parse_method

    method = parse_method(args.method)
    manager, tasks = load_tasks(names, args.include_path, unsafe=args.confirm_run_unsafe_code)
    lm = load_model(args.model, **model_arguments(args))
    if args.apply_chat_template:
        resolve_format(lm.tokenizer, "chat")
    settings = {name: getattr(args, name) for name in ("batch_size", "max_length", "seed", "quiet")}
    results = lm_eval.simple_evaluate(
        model=IMAEJaxLM(lm, method, **settings),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        gen_kwargs=args.gen_kwargs,
        cache_requests=args.cache_requests,
        log_samples=args.log_samples,
        torch_random_seed=None,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
    )
    if is_main():
        results["config"]["imae_jax"]["arguments"] = vars(args)
    return results


def _write(out: Path, results: dict[str, Any]) -> None:
    """Writes samples, which leave the results, as JSON lines of each task, and the results."""
    from lm_eval.utils import handle_non_serializable

    options = {"default": handle_non_serializable, "ensure_ascii": False}
    for task, samples in results.pop("samples", {}).items():
        lines = "".join(json.dumps(sample, **options) + "\n" for sample in samples)
        (out / f"samples_{task.replace('/', '__')}.jsonl").write_text(lines, encoding="utf-8")
    text = json.dumps(results, indent=2, **options)
    (out / HARNESS_FILE).write_text(text + "\n", encoding="utf-8")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m imae_jax.evaluate.lm_eval",
        description="Tasks of the LM Evaluation Harness: writes OUT/lm_eval.json.",
    )
    add_model_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument("--method", default="base", help="base, expert, anti-expert, a number or any method")
    parser.add_argument("--tasks", required=True, help="comma-separated tasks, groups or tags of lm-eval")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--include-path", type=Path, help="directory with further task files")
    parser.add_argument("--limit", type=at_least(1), help="use the first N documents of every task")
    parser.add_argument("--num-fewshot", type=at_least(0), help="examples in a prompt (default: the task's)")
    parser.add_argument("--batch-size", type=at_least(1), help="texts generated, or rows scored, together")
    parser.add_argument("--max-length", type=int, help="cut contexts to N tokens (default: the model's)")
    parser.add_argument("--apply-chat-template", action="store_true", help="prompts as chats")
    parser.add_argument("--gen-kwargs", help="key=value,… to override generation settings of the tasks")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampler")
    parser.add_argument("--log-samples", action="store_true", help="also write every request and answer")
    parser.add_argument("--cache-requests", action="store_true", help="keep all prompts for the next run")
    parser.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="allow tasks that run generated code"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    return parser


if __name__ == "__main__":
    if __package__ == "evaluate":  # The name of HuggingFace's package is taken: anew, by the other name.
        this = "imae_jax.evaluate.lm_eval"
        os.execv(sys.executable, [sys.executable, "-m", this, *sys.argv[1:]])
    sys.exit(main())
