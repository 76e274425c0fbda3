"""What decoding would take on TPUs and GPUs: compiled, not run. Bounds, not measurements.

    python benchmarks/compiled.py --targets h200,v6e --markdown compiled.md
    python benchmarks/compiled.py --targets h200 --devices 8 --models meta-llama/Llama-3.1-70B-Instruct

Needs XLA's compilers (`pip install -e '.[plan-tpu,plan-gpu]'`) and no accelerator; weights are shapes. What
the columns mean: `imae_jax/evaluate/bounds.py`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from imae_jax import targets
from imae_jax.cli import ArgumentParser, command

METHODS = "base,expert,in-model-contrast,icd:anti_expert=adapter"


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python benchmarks/compiled.py", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="h200,v6e", help=f"of {', '.join(targets.TARGETS)}")
    parser.add_argument("--devices", type=int, default=1, help="along tensor")
    parser.add_argument("--models", default="meta-llama/Llama-2-7b-chat-hf,meta-llama/Llama-3.1-8B-Instruct")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--markdown", type=Path, help="file to append the tables to")
    args = parser.parse_args(argv)
    if any(targets.find(name).gpu for name in args.targets.split(",")):
        targets.let_in()  # Before JAX is imported.
    from imae_jax.evaluate.bounds import bounds, bounds_table, set_up
    from imae_jax.evaluate.cost import with_base
    from imae_jax.evaluate.reporting.tables import show
    from imae_jax.evaluate.runner.arguments import parse_methods
    from imae_jax.evaluate.timing import Workload

    set_up()
    methods = with_base(parse_methods(args.methods))
    workload = Workload(args.batch_size, args.prompt_tokens, args.new_tokens)
    for target in args.targets.split(","):
        for model in args.models.split(","):
            shape = (target, args.devices, model, "bfloat16")
            rows = {label: bounds(*shape, method, workload) for label, method in methods.items()}
            title = f"{model}, bfloat16, batch {args.batch_size}, on {args.devices} × {target}"
            table = bounds_table(f"{title} (compiled, not run)", rows)
            show([table])
            if args.markdown:
                with args.markdown.open("a", encoding="utf-8") as file:
                    file.write(table.markdown() + "\n")


if __name__ == "__main__":
    sys.exit(main())
