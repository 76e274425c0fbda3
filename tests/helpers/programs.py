"""Reading compiled programs."""

import re


def gathered_shapes(text: str) -> list[tuple[int, ...]]:
    """Results of all all-gathers, fused and asynchronous ones too."""
    lines = [line for line in text.splitlines() if re.search(r"= .* all-gather(-start)?\(", line)]
    results = [line.split(" all-gather")[0].split(" = ")[1] for line in lines]
    return [
        tuple(map(int, shape.split(",")))
        for result in results
        for shape in re.findall(r"\w+\[([\d,]+)\]", result)
    ]
