"""A page around its sections: one file that fetches nothing, in two languages, for light and dark and for paper."""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from toolkit.report.markup import joined
from toolkit.report.words import Say, Words, visible

GENERATOR = '<meta name="generator" content="Maltu">'  # a page of ours, and no file of the user's
_HEADING = re.compile(r'<section id="([\w-]+)"><h2>(.*?)</h2>', re.DOTALL)
Tile = tuple[Words, Words, Words]  # what, how much, and what is said below it


def page(title: str, says: Words, tiles: Sequence[Tile], sections: Sequence[Markup]) -> str:
    """The whole page as HTML. Its policy lets the browser fetch nothing and run the one script that is known by its
    hash, whatever may stand in the page.
    """
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    body = joined(sections)
    whole = Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">\n{generator}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
        "<style>{style}</style>\n</head>\n<body>\n"
        '<header><div class="top"><div><h1>{title}</h1><p>{says}</p></div>{switch}</div>{tiles}{nav}</header>\n'
        "<main>{body}</main>\n<footer>Maltu</footer>\n<script>{script}</script>\n</body>\n</html>\n"
    ).format(
        policy=policy,
        generator=Markup(GENERATOR),
        title=title,
        style=Markup(style),
        says=says,
        switch=_SWITCH,
        tiles=_tiles(tiles),
        nav=_nav(body),
        body=body,
        script=Markup(script),
    )
    return visible(whole)


_SWITCH = Markup(
    '<fieldset class="switch"><legend>Language / 언어</legend>'
    '<input type="radio" name="lang" id="lang-en" checked><label for="lang-en" lang="en">English</label>'
    '<input type="radio" name="lang" id="lang-ko"><label for="lang-ko" lang="ko">한국어</label></fieldset>'
)


def _tiles(tiles: Sequence[Tile]) -> Markup:
    drawn = (Markup("<li><span>{}</span><b>{}</b><em>{}</em></li>").format(*tile) for tile in tiles)
    return Markup('<ul class="tiles">{}</ul>').format(joined(drawn)) if tiles else Markup("")


def _nav(body: Markup) -> Markup:
    links = [Markup('<li><a href="#{}">{}</a></li>').format(at, Markup(text)) for at, text in _HEADING.findall(body)]
    label = Say("Contents", "차례")
    return Markup('<nav><p class="hidden" id="nav-name">{}</p><ul aria-labelledby="nav-name">{}</ul></nav>').format(
        label, joined(links)
    )
