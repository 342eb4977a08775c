"""The pieces of a page as HTML. Whatever is put into them is escaped, unless it is one of these pieces itself."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from toolkit.report.words import Say, Words, number

EMPTY = Markup("")
FIT = 4  # columns of answers that fit a page


def joined(parts: Iterable[Words]) -> Markup:
    """One after the other, nothing between them."""
    return EMPTY.join(parts)


def section(name: str, heading: Words, *parts: Words) -> Markup:
    """A section under a heading, to be linked to by `name`; nothing where all parts are empty."""
    body = joined(parts)
    if not body:
        return EMPTY
    return Markup('<section id="{}"><h2>{}</h2>{}</section>\n').format(name, heading, body)


def under(heading: Words, *parts: Words) -> Markup:
    """A part of a section under a smaller heading; nothing where all parts are empty."""
    body = joined(parts)
    return Markup("<h3>{}</h3>{}").format(heading, body) if body else EMPTY


def paragraph(text: Words, kind: str = "") -> Markup:
    """A paragraph; kind: `note` for what is said aside."""
    return Markup('<p class="{}">{}</p>').format(kind, text) if kind else Markup("<p>{}</p>").format(text)


def folded(summary: Words, *parts: Words) -> Markup:
    """What is shown when it is asked for."""
    body = joined(parts)
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body) if body else EMPTY


def code(text: str) -> Markup:
    """Text to be copied, as it is."""
    return Markup("<pre><code>{}</code></pre>").format(text)


def inline_code(text: str) -> Markup:
    """A word of a recipe or a command inside a sentence."""
    return Markup("<code>{}</code>").format(text)


def user_text(text: str, lang: str | None = None) -> Markup:
    """What somebody wrote or a model said, line ends kept, its direction of reading its own."""
    attribute = Markup(' lang="{}"').format(lang) if lang in ("ko", "en") else EMPTY
    return Markup('<bdi class="said"{}>{}</bdi>').format(attribute, text)


def table(caption: Words, head: Sequence[Words], rows: Sequence[Sequence[Words]], *, texts: int = 1) -> Markup:
    """A table with a caption; the first column heads its rows, and the columns after the first `texts` are numbers.
    Nothing where there are no rows.
    """
    if not rows:
        return EMPTY
    top = joined(Markup('<th scope="col"{}>{}</th>').format(_class(at, texts), of) for at, of in enumerate(head))
    lines = [Markup("<tr>{}</tr>").format(_row(row, texts)) for row in rows]
    return _wide(caption, Markup("<thead><tr>{}</tr></thead><tbody>{}</tbody>").format(top, joined(lines)))


def _row(row: Sequence[Words], texts: int) -> Markup:
    first = Markup('<th scope="row">{}</th>').format(row[0])
    rest = (Markup("<td{}>{}</td>").format(_class(at, texts), cell) for at, cell in enumerate(row[1:], start=1))
    return joined([first, *rest])


def _class(at: int, texts: int) -> Markup:
    return EMPTY if at < texts else Markup(' class="n"')


def _wide(caption: Words, inside: Markup, more: Markup = EMPTY) -> Markup:
    """Scrolls sideways by itself where it is wider than the page; can be reached with the keyboard."""
    said = f"{caption.en} / {caption.ko}" if isinstance(caption, Say) else Markup(caption).striptags()
    return Markup(
        '<div class="wide" role="region" tabindex="0" aria-label="{}"><table{}><caption>{}</caption>{}</table></div>'
    ).format(said, more, caption, inside)


def answer_table(caption: Words, head: Sequence[Words], rows: Sequence[Sequence[Words]]) -> Markup:
    """Longer texts side by side, columns of equal width; below one another, each with its column's name, on a phone."""
    if not rows:
        return EMPTY
    top = joined(Markup('<th scope="col">{}</th>').format(of) for of in head)
    lines = []
    for row in rows:
        cells = (
            Markup('<td><span class="who" aria-hidden="true">{}</span><div>{}</div></td>').format(who, cell)
            for who, cell in zip(head[1:], row[1:], strict=True)
        )
        lines.append(Markup('<tr><th scope="row">{}</th>{}</tr>').format(row[0], joined(cells)))
    body = Markup("<thead><tr>{}</tr></thead><tbody>{}</tbody>").format(top, joined(lines))
    many = Markup(' class="many" style="--n:{}"').format(len(head)) if len(head) > FIT else EMPTY
    return Markup('<div class="answers">{}</div>').format(_wide(caption, body, many))


def heat(
    caption: Words,
    corner: Words,
    head: Sequence[Words],
    rows: Mapping[Any, Sequence[float | None]],
    *,
    shown: Sequence[Sequence[str]],
    is_low_best: bool = False,
) -> Markup:
    """Numbers as a table whose cells are the darker the larger (is_low_best: the smaller) within their row; the best
    of a row is bold. `shown`: what stands in the cells.
    """
    top = [Markup('<th scope="col">{}</th>').format(corner)]
    top += [Markup('<th scope="col" class="n">{}</th>').format(of) for of in head]
    lines = []
    for (name, values), texts in zip(rows.items(), shown, strict=True):
        known = [found for value in values if (found := number(value)) is not None]
        low, high = (min(known), max(known)) if known else (0.0, 0.0)
        cells = [Markup('<th scope="row">{}</th>').format(name)]
        for value, text in zip(values, texts, strict=True):
            found = number(value)
            share = 0.0 if found is None or high == low else (found - low) / (high - low)
            share = 1 - share if is_low_best and found is not None and high > low else share
            is_best = found is not None and high > low and share == 1.0
            inside = Markup("<b>{}</b>").format(text) if is_best else text
            cells.append(Markup('<td class="n heat" style="--v:{}%">{}</td>').format(f"{100 * share:.0f}", inside))
        lines.append(Markup("<tr>{}</tr>").format(joined(cells)))
    if not lines:
        return EMPTY
    body = Markup("<thead><tr>{}</tr></thead><tbody>{}</tbody>").format(joined(top), joined(lines))
    return _wide(caption, body)


def bars(caption: Words, head: tuple[Words, Words], values: Mapping[Any, float], shown: Sequence[str]) -> Markup:
    """Numbers under their names (texts or Says) as bars in a table, the longest as wide as its column; what is below"
    " 0 is hatched."""
    if not values:
        return EMPTY
    most = max(abs(value) for value in values.values()) or 1.0
    lines = [
        Markup(
            '<tr><th scope="row">{}</th><td class="n">{}</td>'
            '<td class="bar" aria-hidden="true"><i class="{}" style="width:{}%"></i></td></tr>'
        ).format(name, text, "minus" if value < 0 else "plus", f"{100 * abs(value) / most:.1f}")
        for (name, value), text in zip(values.items(), shown, strict=True)
    ]
    top = Markup('<th scope="col">{}</th><th scope="col" class="n">{}</th><td></td>').format(*head)
    return _wide(caption, Markup("<thead><tr>{}</tr></thead><tbody>{}</tbody>").format(top, joined(lines)))
