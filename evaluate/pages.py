"""HTML pages of one file: a template with its style and script inlined, and nothing from the network."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

ASSETS = Path(__file__).parent


def render(name: str, **values: Any) -> str:
    """A page from `name.html`, `page.css`, `name.css` and, where there is one, `name.js`.

    Args:
        name: path of these files, relative to this folder, without their ending.
        values: for the template, which escapes them. It gets `style` and `script` besides.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    for key, files in (("style", ("page.css", f"{name}.css")), ("script", (f"{name}.js",))):
        paths = (path for path in map(ASSETS.joinpath, files) if path.exists())
        text = "\n".join(path.read_text(encoding="utf-8").strip() for path in paths)
        values[key] = Markup(text)
    return environment.get_template(f"{name}.html").render(values)
