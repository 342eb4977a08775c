"""How well the spoken score tells spoken from written text that it has never seen.

    python benchmarks/spoken.py [--data FOLDER]          (default: ../shared/data beside the clone; about 2 minutes)

Three things: the classifier that ships, on register_spoken_written.valid (balanced accuracy per language, a table per
source); real text in order, which should be casual above polite above news; and, not shipped, the same classifier that
also learns half of the train file's sources and is measured on the valid rows of the other half, over every way to
halve them. Skips with the reason where the data is not there. Figures go to benchmarks/spoken.json.
"""

import argparse
import gzip
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from machine import save, say, surroundings

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from toolkit.bases.spoken import FACTS, manner, score_texts, scorer  # noqa: E402
from toolkit.bases.spoken_features import LANGUAGES, Language  # noqa: E402
from toolkit.bases.spoken_train import learn, read_material  # noqa: E402
from toolkit.shipped import shipped  # noqa: E402

REGISTER = "classification/register_spoken_written.{part}.jsonl.gz"
GOAL, GOAL_HELD_OUT = 0.86, 0.90
N_LEARNED = 1500  # rows of a source that the classifier that does not ship learns from
N_TEXTS = 2000  # of a kind of real text
SEED = 0
# Real text: what it is called here, its file, and what its rows say. The first three should come in this order.
REAL = {
    lang: (
        ("casual", f"persona/ms_chitchat_{lang}.valid.jsonl.gz", {"persona": "witty"}),
        ("polite", f"persona/ms_chitchat_{lang}.valid.jsonl.gz", {"persona": "professional"}),
        ("news", "translation/ko_en.valid.jsonl.gz", {"source": "ke_news_dev"}),
        ("people", people, {}),
    )
    for lang, people in (
        ("ko", "base/songys_chatbot_ko.valid.jsonl.gz"),
        ("en", "base/self_dialogue_en.valid.jsonl.gz"),
    )
}
ORDER = ("casual", "polite", "news")
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a gzipped file of JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def balanced(found: Iterable[tuple[bool, bool]]) -> float:
    """The mean of the shares of (is spoken, is called spoken) that are right on either side; of one side where there
    is but one.
    """
    sides: dict[bool, list[bool]] = {}
    for is_spoken, called in found:
        sides.setdefault(is_spoken, []).append(is_spoken == called)
    return statistics.mean(statistics.mean(of) for of in sides.values())


def shipped_on(rows: Sequence[Row], lang: Language) -> dict[str, Any]:
    """Balanced accuracy and the share right of each source."""
    mine = [row for row in rows if row["lang"] == lang]
    found = [(row, score >= 0.5) for row, score in zip(mine, score_texts([r["text"] for r in mine], lang), strict=True)]
    sources: dict[str, list[bool]] = {}
    for row, called in found:
        sources.setdefault(f"{row['label']} {row['source']}", []).append(called == (row["label"] == "spoken"))
    return {
        "balanced_accuracy": round(balanced((row["label"] == "spoken", called) for row, called in found), 4),
        "sources": {name: {"rows": len(of), "right": round(statistics.mean(of), 4)} for name, of in sources.items()},
    }


def real_text(data: Path, lang: Language) -> dict[str, float]:
    """The mean score of each kind of real text, in the order given."""
    found = {}
    for kind, file, wanted in REAL[lang]:
        rows = [row for row in read(data / file) if all(row[key] == value for key, value in wanted.items())]
        texts = [row[lang] if lang in row else row["messages"][-1]["content"] for row in rows]
        found[kind] = round(manner(score_texts(sorted(set(texts))[:N_TEXTS], lang)).mean, 4)
    return found


def halves(sources: Sequence[str]) -> list[tuple[str, ...]]:
    """Every way to learn from half of some sources; a single one is learned from, or not."""
    if len(sources) == 1:
        return [(), tuple(sources)]
    return list(itertools.combinations(sorted(sources), len(sources) // 2))


def held_out(train: Sequence[Row], valid: Sequence[Row], lang: Language) -> list[dict[str, object]]:
    """The classifier that also learns some sources, measured on the valid rows of the others; a side that has no other
    is measured on valid rows of the source that was learned from (`strict` is false then).
    """
    side_of = {(row["label"], row["source"]) for row in train if row["lang"] == lang}
    by_side = {side: sorted(source for of, source in side_of if of == side) for side in ("spoken", "written")}
    found: list[dict[str, object]] = []
    for spoken, written in itertools.product(halves(by_side["spoken"]), halves(by_side["written"])):
        learned = {*(("spoken", source) for source in spoken), *(("written", source) for source in written)}
        more: list[tuple[str, bool]] = []
        for side, source in sorted(learned):
            texts = [r["text"] for r in train if (r["lang"], r["label"], r["source"]) == (lang, side, source)]
            texts = random.Random(SEED).sample(texts, min(N_LEARNED, len(texts)))
            more += [(text, side == "spoken") for text in texts]
        fitted = learn(replace(read_material(lang), more=tuple(more)), SEED).scorer
        new = side_of - learned
        lacking = {side for side in by_side if side not in {of for of, _ in new}}
        measured = new | {one for one in learned if one[0] in lacking}
        rest = [row for row in valid if row["lang"] == lang and (row["label"], row["source"]) in measured]
        called = [(row["label"] == "spoken", fitted.score(row["text"]) >= 0.5) for row in rest]
        one = {
            "learned": sorted(" ".join(pair) for pair in learned),
            "measured_on": sorted(" ".join(pair) for pair in measured),
            "strict": not lacking,
            "balanced_accuracy": round(balanced(called), 4),
        }
        say(f"{lang}  learned {one['learned']}: {one['balanced_accuracy']:.3f} on {one['measured_on']}")
        found.append(one)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the real text")
    asked = parser.parse_args()
    valid_file = asked.data / REGISTER.format(part="valid")
    if not valid_file.exists():
        say(f"skipped: {valid_file} is not there. Name the folder that holds it with --data.")
        return
    around = surroundings(("numpy", "safetensors"))
    say(f"{around}  seed {SEED}")
    results: dict[str, object] = {"machine": around, "seed": SEED, "day": datetime.now(UTC).date().isoformat()}
    facts = json.loads((shipped("spoken") / FACTS).read_text(encoding="utf-8"))
    train, valid = read(asked.data / REGISTER.format(part="train")), read(valid_file)
    for lang in LANGUAGES:
        scorer(lang)
        measured, order = shipped_on(valid, lang), real_text(asked.data, lang)
        say(f"\n{lang}  ships: balanced accuracy {measured['balanced_accuracy']:.3f} (goal {GOAL})")
        for name, of in measured["sources"].items():
            say(f"    {name:<32}{of['rows']:>6} rows  {of['right']:.3f} right")
        say(f"{lang}  held-out folds of the data that ships: {facts[lang]['measured']}")
        in_order = [order[kind] for kind in ORDER]
        is_sensible = sorted(in_order, reverse=True) == in_order
        say(f"{lang}  real text: {order}: {' > '.join(ORDER)} {'holds' if is_sensible else 'does NOT hold'}")
        halved = held_out(train, valid, lang)
        own = {"ships": measured, "folds": facts[lang]["measured"], "real_text": order, "held_out_sources": halved}
        for name, wanted in (("held_out_strict", True), ("held_out_single_source_learned", False)):
            of = [float(str(one["balanced_accuracy"])) for one in halved if one["strict"] == wanted]
            if of:
                own[name] = round(statistics.mean(of), 4)
                say(f"{lang}  {name}, not shipped: {own[name]:.3f} (goal {GOAL_HELD_OUT})")
        results[lang] = own
    save(__file__, results)


if __name__ == "__main__":
    main()
