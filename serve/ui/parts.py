"""The page's own parts, on Gradio's HTML component: a talk, the sliders of a mixture, the list of what was stored.

Their scripts lie beside this file. They build every element themselves, so nothing that is said is read as markup.
"""

from pathlib import Path
from typing import Any

import gradio

_HERE = Path(__file__).parent
STYLE = (_HERE / "page.css").read_text(encoding="utf-8")


def talk(elem_id: str, kept: str = "") -> gradio.HTML:
    """A talk. kept: the name under which the tab keeps it over a reload, and lets it be edited and judged."""
    return _part("talk.js", elem_id, {"turns": [], "busy": False}, kept=kept, judge=False, name="", empty="")


def weights(elem_id: str) -> gradio.HTML:
    """The sliders of a mixture."""
    return _part("weights.js", elem_id, {}, visible=False)


def stored(elem_id: str) -> gradio.HTML:
    """What was stored of the visitor."""
    return _part("stored.js", elem_id, {"items": [], "off": False})


def status(elem_id: str) -> gradio.HTML:
    """A line that readers of the screen hear of when it changes."""
    return gradio.HTML(
        "", html_template='<p role="status">${value}</p>', elem_id=elem_id, elem_classes="status", js_on_load=None
    )


def _part(script: str, elem_id: str, value: Any, **more: Any) -> gradio.HTML:
    source = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in ("dom.js", script))
    return gradio.HTML(
        value,
        html_template="<div></div>",
        js_on_load=source,
        apply_default_css=False,
        elem_id=elem_id,
        elem_classes="part",
        texts={},
        **more,
    )
