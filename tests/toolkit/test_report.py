"""report.html: self-contained, in both languages, everything escaped, each part where there is something to show."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.report_world import curve, facts, make_run, measured, samples, with_experts, with_search
from toolkit import disk, steps
from toolkit.bundle import Run
from toolkit.errors import DiskError, RunError
from toolkit.report.seen import REQUIRED, see
from toolkit.report.write import report_page, write_report

VOID = {"meta", "input", "br"}


class Parsed(HTMLParser):
    """A page's tags with their attributes, in order; whether they nest; its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.opened: list[str] = []
        self.torn: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.opened or self.opened.pop() != tag:
            self.torn.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(run: Run) -> str:
    return report_page(see(run))


def full(path: Path) -> Run:
    """With everything but labels, and with one thing to doubt."""
    told = facts("tiny")
    told["data"]["parts"]["test"] = 12
    run = make_run(path, told)
    with_search(run)
    with_experts(run, "mix", "logprob", {"fitted": {"loss": 4.0, "of_equal": 4.1, "of_best": 4.3, "n_rows": 9}})
    return run


def test_a_page_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    page = page_of(full(tmp_path / "tiny"))
    assert len(page.encode()) < 300_000
    parsed = Parsed(page)
    assert parsed.torn == [] and parsed.opened == []
    fetched = [
        of for _, attributes in parsed.tags for key, of in attributes.items() if key in ("src", "srcset", "data")
    ]
    links = [attributes["href"] for attributes in parsed.all("a") if not str(attributes["href"]).startswith("#")]
    assert fetched == [] and not parsed.all("link") and "url(" not in page and "@import" not in page
    assert links == ["search/plots.html"]
    assert "default-src 'none'" in str(parsed.all("meta")[1]["content"])
    ids = [of["id"] for _, of in parsed.tags if "id" in of]
    assert len(ids) == len(set(ids)) > 10


def test_every_part_stands_in_the_page_of_a_run_that_has_them_all(tmp_path: Path) -> None:
    sections = [of["id"] for of in Parsed(page_of(full(tmp_path / "tiny"))).all("section")]
    wanted = "doubts before-after curves experts search data asked cost use"
    assert sections == wanted.split()


def test_a_part_without_anything_to_show_is_left_out(tmp_path: Path) -> None:
    sections = [of["id"] for of in Parsed(page_of(make_run(tmp_path / "tiny", lines=[]))).all("section")]
    assert sections == ["before-after", "data", "asked", "cost", "use"]


def test_headings_and_sentences_stand_there_in_both_languages(tmp_path: Path) -> None:
    page = page_of(full(tmp_path / "tiny"))
    headings = re.findall(r"<h[23]>(.*?)</h[23]>", page)
    captions = re.findall(r"<(?:figcaption|caption)[^>]*>(.*?)</(?:figcaption|caption)>", page)
    assert len(headings) > 12 and len(captions) > 12
    for heading in [*headings, *captions]:
        assert 'lang="en"' in heading, heading
    assert all('lang="en"' in heading and 'lang="ko"' in heading for heading in headings)
    assert page.count('class="t" lang="en"') == page.count('class="t" lang="ko"') > 100


def test_headings_tables_and_charts_can_be_read_without_seeing_them(tmp_path: Path) -> None:
    parsed = Parsed(page_of(full(tmp_path / "tiny")))
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    n_tables = len(parsed.all("table"))
    assert n_tables == len(parsed.all("caption")) == len(parsed.all("thead")) > 10
    assert all(of.get("scope") in ("row", "col") for of in parsed.all("th"))
    charts = parsed.all("svg")
    captions = {of["id"] for of in parsed.all("figcaption")}
    assert len(charts) >= 3 and all(of["role"] == "img" and of["aria-labelledby"] in captions for of in charts)


EVIL = "<script>hacked=1</script><img src=x onerror=hacked=1>\"'><svg/onload=hacked=1>&lt;b&gt;{0}{{x}}%s"


def evil_run(path: Path) -> Run:
    told = facts("tiny")
    for part in ("before", "after"):
        told["results"][part]["samples"] = [
            {"name": EVIL, "lang": EVIL, "prompt": EVIL, "answer": EVIL + part, "finish": "length", "n_tokens": 1}
        ]
        told["results"][part][EVIL] = {"all": 1.0, EVIL: 2.0}
    told["results"]["after"]["baselines"] = {EVIL + " accuracy": 0.5}
    told["results"]["after"]["confusion"] = {"labels": [EVIL, "b"], "rows": [[1, 2], [3, 4]]}
    told["inputs"]["recipe"] |= {EVIL: EVIL, "name": EVIL}
    told["inputs"]["data"][EVIL] = EVIL
    told["data"]["dropped"] = {EVIL: 50}
    told |= {"command": EVIL, "task": EVIL, "base": {"model": EVIL}}
    told["surroundings"] |= {"device": EVIL, "versions": {EVIL: EVIL}}
    run = make_run(path, told)
    with_search(run)
    report = {"labels": [EVIL, "other"], "all": {"n": 3, "accuracy": 0.5, "confusion": [[1, 2]]}}
    with_experts(run, "route", EVIL, report, helps=False)
    found = run.facts()
    found["experts"][EVIL] = found["experts"].pop("반말")
    found["combination"]["weights"] = {EVIL: 1.0}
    found["combination"]["on"] = {EVIL: {EVIL: 1.0, "polite": 0.5}}
    found["search"]["importances"] = {EVIL: 1.0}
    found["search"]["importances_note"] = EVIL
    found["search"]["best"]["values"] = found["search"]["best_trials"][0]["values"] = {EVIL: EVIL}
    found["search"]["kinds"][0]["kind"] = EVIL
    return Run(run.path) if run.update(**found) else run


def test_whatever_was_written_stays_text(tmp_path: Path) -> None:
    page = page_of(evil_run(tmp_path / "tiny"))
    parsed = Parsed(page)
    assert len(parsed.all("script")) == 1 and not parsed.all("img") and parsed.torn == []
    handlers = [key for _, attributes in parsed.tags for key in attributes if key.startswith("on")]
    assert handlers == [] and not any("onload" in of for of in parsed.all("svg"))
    assert sum(EVIL in text for text in parsed.texts) > 20


def test_signs_that_cannot_be_seen_are_shown(tmp_path: Path) -> None:
    told = facts()
    answer = "가\u200b나\u202e다\x00라\ud800마\r바👩\u200d👩"
    told["results"]["after"]["samples"] = [{"name": "p0", "lang": "ko", "prompt": "?", "answer": answer}]
    run = make_run(tmp_path / "tiny")
    see_run = see(run)
    page = report_page(type(see_run)(run.path, "tiny", told, [], [], {}))
    assert "가⟨U+200B⟩나⟨U+202E⟩다␀라?마␍바👩\u200d👩" in page
    page.encode("utf-8")


def test_thousands_of_very_long_answers_do_not_burst_the_page(tmp_path: Path) -> None:
    told = facts()
    for part in ("before", "after"):
        told["results"][part]["samples"] = [
            {"name": f"p{at}", "lang": "ko", "prompt": "물" * 5000, "answer": "말" * 50_000} for at in range(300)
        ]
    page = page_of(make_run(tmp_path / "tiny", told))
    assert len(page.encode()) < 1_500_000
    assert "(+48,800)" in page and "240개가 samples.md에 더 있습니다." in page


@pytest.mark.parametrize("n", [1, 5, 50_000])
def test_curves_are_drawn_from_few_points_and_from_many(tmp_path: Path, n: int) -> None:
    page = page_of(make_run(tmp_path / "tiny", lines=curve(n)))
    assert len(page.encode()) < 120_000
    drawn = re.findall(r'<path class="line s2" d="M([^"]*)"', page)[0].split("L")
    assert len(drawn) == min(n, 240)
    assert all(-1 <= float(number) <= 1001 for point in drawn for number in point.split())
    assert ('class="spread' in page) == (n > 240)


def test_what_was_changed_in_the_recipe_comes_first(tmp_path: Path) -> None:
    seen = see(make_run(tmp_path / "tiny"))
    assert seen.changed is not None
    assert list(seen.changed) == ["name", "base.model", "data.train", "adapter.rank", "train.epochs"]
    assert seen.changed["adapter.rank"] == (4, 16) and seen.changed["base.model"] == ("spoken-mini", REQUIRED)
    page = report_page(seen)
    assert page.index("<code>adapter.rank</code>") < page.index("train.seed: 0")


def test_a_recipe_of_another_version_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    run.recipe_file.write_text("name: tiny\nnobody_knows: 1\n", encoding="utf-8")
    assert "The recipe is of another version" in page_of(run)


def test_data_and_cost_are_told_in_numbers(tmp_path: Path) -> None:
    texts = "|".join(Parsed(page_of(make_run(tmp_path / "tiny"))).texts)
    for told in ("4,321", "0.81 (90 %)", "too long", "450", "812", "0.11", "20 s", "20초", "unicode"):
        assert told in texts, told


def test_a_run_without_a_base_to_compare_with_has_one_column(tmp_path: Path) -> None:
    told = facts()
    told["results"] = {"before": {}, "after": measured(4.0)}
    page = page_of(make_run(tmp_path / "tiny", told))
    assert "Measured" in page and "Before and after" not in page and "그래 3" in page


def test_answers_that_did_not_end_are_marked(tmp_path: Path) -> None:
    told = facts()
    told["results"]["after"]["samples"][0]["finish"] = "length"
    told["results"]["after"]["samples"][1]["answer"] = ""
    page = page_of(make_run(tmp_path / "tiny", told))
    assert page.count('class="flag"') == 2


def test_a_confusion_matrix_has_a_row_for_each_true_label(tmp_path: Path) -> None:
    told = facts() | {"task": "classify"}
    confusion = {"labels": ["긍정", "부정"], "rows": [[8, 2], [1, 9]]}
    told["results"] = {"before": {}, "after": {"accuracy": {"all": 0.85}, "confusion": confusion}}
    page = page_of(make_run(tmp_path / "tiny", told))
    row = re.findall(r'<th scope="row">부정</th>(.*?)</tr>', page)[0]
    assert re.findall(r">(\d)<", row) == ["1", "9"] and "<b>9</b>" in row


@pytest.mark.parametrize(
    ("kind", "report", "wanted"),
    [
        (
            "route",
            {
                "labels": ["반말", "polite", "other"],
                "after 1": {"n": 40, "accuracy": 0.7, "calibration_error": 0.031, "other": 0.05,
                            "confusion": [[14, 5, 1], [5, 14, 1]]},
                "all": {"n": 99, "accuracy": 0.92, "calibration_error": 0.02, "other": 0.0,
                        "confusion": [[47, 2, 1], [3, 45, 1]]},
                "strangers sent to other": 0.88,
            },
            ["92.0 %", "0.031", "88 %", "47"],
        ),
        (
            "gate",
            {"loss": {"equal": 4.4, "gate": 4.1234}, "load": {"반말": 0.61, "polite": 0.39},
             "load_by_layer": {"0": {"반말": 0.5, "polite": 0.5}, "1": {"반말": 0.72, "polite": 0.28}},
             "evenness": 0.97, "top": 0.66, "losses": [4.4, 4.2, 4.1234]},
            ["4.1234", "61 %", "72 %", "0.97"],
        ),
        (
            "bag",
            {"seed": 0, "bootstrap": True, "conversations": 60,
             "members": {"member-1": {"seed": 7, "different": 38}},
             "out of bag": {"n": 59, "of": 60, "members each": 1.5, "loss": 4.2345, "loss alone": 4.5}},
            ["4.2345", "4.5", "38", "59"],
        ),
        (
            "boost",
            {"weights": {}, "rounds": [{"round": 1, "weight": 1.0, "held-out loss": 4.5},
                                       {"round": 2, "weight": 0.4321, "held-out loss": 4.4}],
             "stopped": "1 round in a row did not help"},
            ["0.4321", "4.4", "1 round in a row did not help"],
        ),
        (
            "mix",
            {"fitted": {"loss": 4.0123, "of_equal": 4.1, "of_best": 4.3, "n_rows": 9}},
            ["4.0123", "4.1000", "9 watched conversations"],
        ),
        (
            "merge",
            {"error": 0.0312, "told": ["weights were made to sum to 1"],
             "trials": [{"weights": {"반말": 0.25, "polite": 0.75}, "loss": 4.3333}]},
            ["3.12 %", "weights were made to sum to 1", "4.3333"],
        ),
    ],
)  # fmt: skip
def test_how_a_combination_was_made_is_told(
    tmp_path: Path, kind: str, report: dict[str, Any], wanted: list[str]
) -> None:
    run = make_run(tmp_path / "tiny")
    with_experts(run, kind, "how", report)
    texts = "|".join(Parsed(page_of(run)).texts)
    for told in [*wanted, "polite", "runs/old", "3.95", "응 1", "네네 1", "helps: loss 4", "도움이 됩니다"]:
        assert told in texts, told


def test_a_search_is_told_with_its_history_and_slices(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    with_search(run)
    page = page_of(run)
    assert page.count('class="ring ') == 6 and page.count("<title>1: 4.1</title>") == 1
    texts = "|".join(Parsed(page).texts)
    for told in ("90 of 240", "75 %", "train.batch_size", "search/plots.html", "0.0099"):
        assert told in texts, told


def test_the_learning_rate_of_a_search_is_the_one_that_won(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    assert "learning rate 0.003," in page_of(run)
    with_search(run)
    page = page_of(run)
    assert "learning rate 0.0099," in page and "learning rate 0.003," not in page


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", facts() | {"status": "training"})
    with pytest.raises(RunError, match="not finished"):
        write_report(run)
    assert not (run.path / "report.html").exists()


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    (run.path / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match=r"metrics\.jsonl"):
        write_report(run)


def test_a_report_that_cannot_be_written_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "tiny")

    def full_disk(path: Path, text: str) -> None:
        raise DiskError(f"{path}: cannot be written (No space left on device).")

    monkeypatch.setattr(disk, "write_text", full_disk)
    console = Console(record=True, width=400)
    steps.report(run, console)
    said = console.export_text()
    assert "No space left on device" in said and "python -m toolkit compare" in said
    assert run.facts()["status"] == "finished"


def test_answers_of_a_made_up_run_differ(tmp_path: Path) -> None:
    assert len({one["answer"] for one in samples()}) == len(samples()) > 3
