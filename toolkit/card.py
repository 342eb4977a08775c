"""What a run says of itself: the table at the end of training, and README.md in its folder (a model card)."""

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit import disk
from toolkit.bases import catalog
from toolkit.bases.fetch import is_folder_name
from toolkit.bundle import Run

N_SHOWN = 3  # samples a language in the terminal
FALLS = ("loss", "content loss", "bits per byte")  # better when lower; shown with the change in per cent


def show_result(run: Run, console: Console) -> None:
    """Print before against after, a few answers side by side, and what to do next."""
    results = run.finished("results")["results"]
    show_numbers(results, run.name, console)
    for lang, shown in _by_language(results).items():
        for old, new in shown[:N_SHOWN]:
            console.print(f"[bold]{lang}[/bold]  {_plain(new['prompt'])}", highlight=False)
            if old is not None:
                console.print(f"    base   {_plain(old['answer'])}", highlight=False)
            console.print(f"    now    {_plain(new['answer'])}\n", highlight=False)
    path, samples, page = (shlex.quote(str(run.path / name)) for name in ("", "samples.md", "report.html"))
    whole = f"\n       {page}: all of it on one page" if (run.path / "report.html").exists() else ""
    if _labels_alone(run.facts()):
        line = f"Next:  python -m toolkit evaluate {path} --data FILE      label other texts; it cannot talk, but vote"
        console.print(line + whole, highlight=False, markup=False, soft_wrap=True)
        return
    console.print(
        f"Next:  python -m toolkit chat {path}      talk to it\n"
        f"       python -m serve {path}             serve it, with a page\n"
        f"       {samples}: every answer, before and after{whole}",
        highlight=False,
        markup=False,
        soft_wrap=True,  # a path broken in two cannot be copied
    )


def show_numbers(results: dict[str, Any], name: str, console: Console) -> None:
    """Print before and after as a table: a metric a row, three columns a language; one where nothing was before."""
    rows = {(row.metric, row.lang): row for row in compared(results)}
    if not rows:
        console.print("No held-out talk, so nothing was measured.")
        return
    has_before = any(row.before is not None for row in rows.values())
    langs = sorted({lang for _, lang in rows}, key=lambda lang: (lang != "", lang))
    langs = [lang for lang in langs if lang] or [""]  # with languages there is no need for all of them together
    table = Table()
    table.add_column("")
    for lang in langs:
        for column in (f"{lang} base", f"{lang} {name}", "change") if has_before else (f"{lang} {name}",):
            table.add_column(escape(column.strip()), justify="right")
    by_language = {metric for metric, lang in rows if lang}
    for metric in dict.fromkeys(metric for metric, _ in rows):
        cells = [rows.get((metric, lang if metric in by_language else "")) for lang in langs]
        texts = [cell.texts() if cell else ("", "", "") for cell in cells]
        table.add_row(metric, *(text for three in texts for text in (three if has_before else three[1:2])))
    console.print(table)


@dataclass(frozen=True)
class Compared:
    """One number before and after; None where it was not measured. lang is empty for all languages together."""

    metric: str
    lang: str
    before: float | None
    after: float | None

    def texts(self) -> tuple[str, str, str]:
        """Before, after and, where lower is better, the change."""
        return _number(self.before), _number(self.after), self._change()

    def _change(self) -> str:
        if self.before is None or self.after is None or not self.metric.startswith(FALLS) or self.before == 0:
            return ""
        return f"{100 * (self.after - self.before) / self.before:+.1f} %"


def compared(results: dict[str, Any]) -> list[Compared]:
    """Every number of after beside that of before, in the order in which they were measured."""
    before, after = _flat(results.get("before") or {}), _flat(results.get("after") or {})
    return [Compared(metric, lang, before.get((metric, lang)), value) for (metric, lang), value in after.items()]


def _flat(measured: dict[str, Any]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for metric, values in measured.items():
        for lang, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int | float):
                is_baseline = metric == "baselines"
                found[(lang, "") if is_baseline else (metric, "" if lang == "all" else lang)] = float(value)
    return found


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _by_language(results: dict[str, Any]) -> dict[str, list[tuple[dict[str, Any] | None, dict[str, Any]]]]:
    old = {s["prompt"]: s for s in (results.get("before") or {}).get("samples", ())}
    found: dict[str, list[tuple[dict[str, Any] | None, dict[str, Any]]]] = {}
    for sample in (results.get("after") or {}).get("samples", ()):
        found.setdefault(sample.get("lang") or "", []).append((old.get(sample["prompt"]), sample))
    return found


def _plain(text: str) -> str:
    return escape(" ".join(text.split()))


def write_card(run: Run, section: str = "") -> None:
    """README.md of the run: recipe, data with hashes, results, how to load and serve. Readable on a model hub as it
    is. `section`: Markdown that says how the result came about, where more is to be said than a recipe does.
    """
    facts = run.facts()
    data = "\n".join(f"| {name} | `{digest[:16]}` |" for name, digest in facts["inputs"]["data"].items())
    around = facts["surroundings"]
    recipe = run.recipe_file.read_text(encoding="utf-8")
    base = facts["base"]
    is_whole = (run.path / "model").is_dir()
    on_hub = None if is_whole else _hub_id(base["model"])
    heading = [
        "---",
        *([f"base_model: {json.dumps(on_hub)}"] if on_hub else []),
        "library_name: " + ("transformers" if is_whole else "peft"),
        "tags: [maltu]",
        "---",
    ]
    text = f"""# {run.name}

Trained with Maltu {around["versions"]["maltu"]}: `{facts["command"]}`

{_table(facts["results"], run.name)}

{_parts_line(facts["data"]["parts"])};
{facts["fit"]["steps"]:,} steps, best at {facts["fit"]["best_step"] or facts["fit"]["steps"]:,},
{facts["fit"]["seconds"]:.0f} s on {around["device"]} ({around["threads"]} threads). Answers side by side: samples.md.

## Use it

{_use_lines(facts)}
{_load_lines(run, base, is_whole)}
{section and section.strip() + chr(10) * 2}## Data

| file | SHA-256 |
|---|---|
{data}

Base: {base["model"]}, SHA-256 of its files `{base["hash"][:16]}`.

## Recipe

```yaml
{recipe}```
"""
    disk.write_text(run.path / "README.md", "\n".join(heading) + "\n" + text)


def _table(results: dict[str, Any], name: str) -> str:
    rows = [f"| {row.metric} {row.lang} | {' | '.join(row.texts())} |" for row in compared(results)]
    if not rows:
        return "No held-out talk, so nothing was measured."
    return "\n".join([f"| on held-out talk and prompts | base | {name} | change |", "|---|---|---|---|", *rows])


def _hub_id(model: str) -> str | None:
    """The base's name on the hub; None for a folder, and for a base that is not there (shipped, or from scratch)."""
    if is_folder_name(model):
        return None
    known = catalog.find(model)
    if known is not None:
        return known.hub_id
    return model if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII) else None


def _parts_line(parts: dict[str, int]) -> str:
    """What was learned from, and what the numbers were measured on: test, else valid, as `fit.prepare.Rows` says."""
    learned = f"Learned from {parts['train']:,} conversations"
    if parts["test"]:
        return f"{learned}, watched on {parts['valid']:,}, judged by {parts['test']:,}"
    if parts["valid"]:
        return f"{learned}, watched on {parts['valid']:,} and judged by the same (valid: none were kept for test)"
    return f"{learned}; no held-out talk"


def _labels_alone(facts: dict[str, Any]) -> bool:
    """Whether the run's base labels texts and cannot talk."""
    return bool(facts["base"].get("kind") == "encoder")


def _use_lines(facts: dict[str, Any]) -> str:
    if _labels_alone(facts):
        return "    python -m toolkit evaluate RUN --data FILE\n\nIt labels texts; it cannot talk."
    return "    python -m toolkit chat RUN\n    python -m serve RUN"


def _load_lines(run: Run, base: dict[str, Any], is_whole: bool) -> str:
    if base.get("kind") == "encoder":
        return "\nIn Python: `toolkit.loaded.load_labeller(RUN)`; `adapters/main` is a plain folder of PEFT.\n"
    if is_whole:
        return '\nIn Python: `AutoModelForCausalLM.from_pretrained("RUN/model")`.\n'
    if not run.adapter().is_dir():
        return (
            "\nIn Python: `toolkit.combine.speaker.open_speaker(RUN)`; of one expert"
            " `toolkit.loaded.load_run(RUN, adapter=NAME)`.\n"
        )
    config = run.adapter() / "adapter_config.json"
    if "peft_type" in json.loads(config.read_text(encoding="utf-8")):
        return '\nIn Python: `PeftModel.from_pretrained(base_model, "RUN/adapters/main")`.\n'
    return "\nIn Python: `toolkit.loaded.load_run(RUN).model` (a kind that PEFT does not have).\n"
