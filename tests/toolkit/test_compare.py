"""`compare RUN RUN…`: several runs side by side, in the terminal and as a page; a report written again."""

from pathlib import Path

import pytest

from tests.report_world import facts, make_run, measured
from tests.toolkit.test_report import Parsed
from toolkit.__main__ import main
from toolkit.bundle import Run
from toolkit.report.seen import see
from toolkit.report.several import cautions, differences, names_of, several_page


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Run]:
    """Runs that differ in their rank and in what they came to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    better = facts("나중")
    better["inputs"]["recipe"]["adapter.rank"] = 32
    better["results"]["after"] = measured(3.5, "오")
    return make_run(tmp_path / "runs" / "처음"), make_run(tmp_path / "runs" / "나중", better)


def compare(*arguments: object) -> int:
    return main(["compare", *map(str, arguments)])


def test_numbers_and_recipes_stand_side_by_side_in_the_terminal(
    two: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("runs/처음", "runs/나중") == 0
    said = capsys.readouterr().out
    lines = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:-1]]
        for line in said.splitlines()
        if "│" in line
    }
    assert lines["loss"] == ["4.000", "3.500"] and lines["adapter.rank"] == ["4", "32"]
    assert "compare.html: written." in said and "not comparable" not in said


def test_the_page_has_columns_for_each_run_and_overlaid_curves(two: tuple[Run, Run]) -> None:
    assert compare("runs/처음", "runs/나중", "--out", "pages/둘.html") == 0
    page = Path("pages/둘.html").read_text(encoding="utf-8")
    parsed = Parsed(page)
    assert parsed.torn == [] and len(page.encode()) < 200_000
    sections = [of["id"] for of in parsed.all("section")]
    assert sections == ["numbers", "curves", "answers", "recipes", "cost", "runs"]
    texts = "|".join(parsed.texts)
    for told in ("그래 0", "오 0", "adapter.rank", "<b>3.500</b>"):
        assert told in (page if told.startswith("<b>") else texts), told
    assert page.count('class="line s1"') == page.count('class="line s2"') == 2


def test_a_link_leads_to_the_page_of_each_run(two: tuple[Run, Run]) -> None:
    assert compare("runs/처음") == 0
    assert compare("runs/처음", "runs/나중", "--out", "pages/둘.html") == 0
    links = [of["href"] for of in Parsed(Path("pages/둘.html").read_text(encoding="utf-8")).all("a")]
    assert [link for link in links if not str(link).startswith("#")] == ["../runs/%EC%B2%98%EC%9D%8C/report.html"]


def test_of_one_run_its_report_is_written_again(two: tuple[Run, Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("runs/처음") == 0
    first = Path("runs/처음/report.html").read_bytes()
    Path("runs/처음/report.html").unlink()
    assert compare("runs/처음") == 0
    assert Path("runs/처음/report.html").read_bytes() == first and not Path("compare.html").exists()
    assert compare("runs/처음", "--out", "mine.html") == 0 and Path("mine.html").read_bytes() == first
    assert "runs/처음/report.html: written." in capsys.readouterr().out


def test_other_held_out_talk_is_said_and_no_number_is_called_best(
    two: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    told = two[1].facts()
    told["inputs"]["data"]["내대화.jsonl"] = "f" * 64
    two[1].update(**told)
    assert compare("runs/처음", "runs/나중") == 0
    assert "Numbers are not comparable" in capsys.readouterr().out
    page = Path("compare.html").read_text(encoding="utf-8")
    assert "숫자를 견줄 수 없습니다" in page and "<b>3.500</b>" not in page


@pytest.mark.parametrize(("key", "value"), [("data.test", 0.2), ("train.seed", 1), ("data.clean.near_duplicates", 0.8)])
def test_what_decides_the_split_makes_runs_incomparable(two: tuple[Run, Run], key: str, value: float) -> None:
    told = two[1].facts()
    told["inputs"]["recipe"][key] = value
    two[1].update(**told)
    assert any("not comparable" in one.en for one in cautions([see(run) for run in two]))


def test_over_other_bases_bits_per_byte_compare_and_losses_do_not(two: tuple[Run, Run]) -> None:
    told = two[1].facts()
    told["inputs"]["base"] = "d" * 64
    two[1].update(**told)
    page = several_page([see(run) for run in two], Path("x.html"))
    assert "The bases differ" in page and "<b>1.750</b>" in page and "<b>3.500</b>" not in page


def test_prompts_of_their_own_do_not_make_runs_incomparable(two: tuple[Run, Run]) -> None:
    told = two[1].facts()
    told["inputs"]["data"] = {"내대화.jsonl": "a" * 64, "mine.jsonl": "e" * 64}
    told["inputs"]["recipe"]["evaluate.prompts"] = "mine.jsonl"
    two[1].update(**told)
    assert cautions([see(run) for run in two]) == []


def test_only_prompts_that_several_answered_are_shown(two: tuple[Run, Run]) -> None:
    told = two[1].facts()
    told["results"]["after"]["samples"][0]["prompt"] = "다른 질문"
    two[1].update(**told)
    page = several_page([see(run) for run in two], Path("x.html"))
    assert "다른 질문" not in page and "오늘 뭐 먹지?" not in page and "비 온다" in page


def test_recipes_that_say_the_same_are_said_to(two: tuple[Run, Run]) -> None:
    seen = see(two[0])
    assert differences([seen, seen]) == {} and list(differences([see(run) for run in two])) == ["adapter.rank"]


def test_runs_of_the_same_name_are_told_apart(two: tuple[Run, Run], tmp_path: Path) -> None:
    other = make_run(tmp_path / "old" / "처음")
    assert names_of([see(run) for run in (*two, other)]) == ["runs/처음", "나중", "old/처음"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("runs/처음", "runs/../runs/처음"), "named twice"),
        (("runs/처음", "nowhere"), "not a run folder"),
        (("runs/처음", "runs/나중", "--out", "notes.txt"), "no page of Maltu"),
        (("runs/처음", "--out", "runs"), "is a folder"),
        (("runs/처음", "runs/going"), "not finished"),
    ],
)
def test_what_cannot_be_compared_is_named_and_nothing_is_written(
    two: tuple[Run, Run], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], wanted: str
) -> None:
    Path("notes.txt").write_text("mine", encoding="utf-8")
    make_run(Path("runs/going"), facts("going") | {"status": "training"})
    assert compare(*arguments) == 2
    assert wanted in capsys.readouterr().err
    assert Path("notes.txt").read_text(encoding="utf-8") == "mine" and not Path("compare.html").exists()
    assert not Path("runs/처음/report.html").exists()


def test_a_page_of_ours_may_be_written_over(two: tuple[Run, Run]) -> None:
    assert compare("runs/처음", "runs/나중") == 0 and compare("runs/나중", "runs/처음") == 0
    assert Path("compare.html").read_text(encoding="utf-8").index("나중") > 0


def test_ten_runs_fit_a_page(two: tuple[Run, Run], tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "many" / f"r{at}") for at in range(10)]
    page = several_page([see(run) for run in runs], Path("x.html"))
    assert Parsed(page).torn == [] and page.count('class="line s1 dashed"') == 2


def test_a_key_that_a_recipe_lacks_stays_empty(two: tuple[Run, Run], tmp_path: Path) -> None:
    first, second = two
    inputs = second.facts()["inputs"]
    inputs["recipe"]["combine.kind"] = "mix"
    second.update(inputs=inputs)
    page = several_page([see(first), see(second)], tmp_path / "c.html")
    assert "<code>combine.kind</code></th><td></td><td>mix</td>" in page


def test_runs_without_a_curve_of_their_own_are_named(two: tuple[Run, Run], tmp_path: Path) -> None:
    first, second = two
    (second.path / "metrics.jsonl").write_text("", encoding="utf-8")
    page = several_page([see(first), see(second)], tmp_path / "c.html")
    assert "No curve of one adapter alone: 나중." in page
    assert "No curve of one adapter alone" not in several_page([see(first), see(first)], tmp_path / "c.html")
