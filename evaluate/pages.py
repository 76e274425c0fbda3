"""HTML pages of one file: a template with its style and script inlined, and nothing from the network."""

import base64
import hashlib
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent


def render(name: str, **values: Any) -> str:
    """A page from `name.html`, `page.css`, `name.css` and, where there is one, `name.js`.

    Args:
        name: of the files beside this one.
        values: for the template, which escapes them. It gets `style` and `script`, and for its
            Content-Security-Policy `style_hash` and `script_hash`, besides.
    """
    import jinja2
    from markupsafe import Markup

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
        values |= {key: Markup(text), f"{key}_hash": _csp_hash(text)}
    return environment.get_template(f"{name}.html").render(values)


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
