"""A fragment of a model card: scores as the HuggingFace hub reads them, and as a reader does.

The form is the hub's `model-index` (https://huggingface.co/docs/hub/model-cards#evaluation-results).
"""

import yaml

from imae_jax import __version__
from imae_jax.evaluate.reporting.suite import Results, scores, summary_table


def model_card(results: Results, model: str) -> str:
    """Markdown with front matter; methods with finite scores alone.

    Args:
        results: benchmark and `results.json` of every run by name.
        model: reference of the model.
    """
    evaluations = []
    for name, metric, head, _, by_method in scores(results):
        benchmark, run = results[name]
        evaluations.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": f"{benchmark.title} ({run['protocol']})", "type": benchmark.name},
                "metrics": [
                    {"type": metric, "name": f"{head}, {label}", "value": round(value, 2)}
                    for label, (value, _) in by_method.items()
                    if value is not None
                ],
            }
        )
    front = {"model-index": [{"name": model, "results": evaluations}]}
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n"
        f"## Evaluation\n\nBy [imae_jax](https://pypi.org/project/imae-jax) {__version__}, with 95 % "
        f"bootstrap intervals over questions.\n\n{summary_table(results).markdown()}"
    )
