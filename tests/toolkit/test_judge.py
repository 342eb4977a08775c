"""What a run says of itself (table, card) and what `evaluate` measures: the right numbers, or none."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from toolkit import judge as judging
from toolkit.__main__ import main as maltu
from toolkit.bundle import RUN_FILE, VERSION, Run
from toolkit.card import show_numbers, show_result, write_card
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import RunError
from toolkit.evaluate import subject
from toolkit.judge import Held, Judge
from toolkit.train import main as train

BEFORE = {"loss": {"all": 3.0, "ko": 4.0, "en": 2.0}, "chrf": {"ko": 11.0}}
AFTER = {"loss": {"all": 1.5, "ko": 1.0, "en": 2.0}, "chrf": {"ko": 22.0}, "ended": {"en": 0.5}}


def paper(width: int = 120) -> Console:
    return Console(file=io.StringIO(), width=width)


def written(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def cells(console: Console) -> dict[str, list[str]]:
    """The rows of the table, by their first cell."""
    lines = [line for line in written(console).splitlines() if line[:1] in "┃│"]
    rows = [[cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def make_run(folder: Path, base: str = "spoken-mini", **facts: Any) -> Run:
    """A finished run by its papers alone."""
    adapter = folder / "adapters" / "main"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "recipe.yaml").write_text("name: tiny\n")
    own = {
        "version": VERSION,
        "status": "finished",
        "command": "python -m toolkit.train tiny.yaml",
        "results": {"before": BEFORE, "after": AFTER},
        "inputs": {"data": {"말.jsonl": "a" * 64}},
        "data": {"parts": {"train": 40, "valid": 5, "test": 3}},
        "surroundings": {"versions": {"maltu": "0"}, "device": "cpu", "threads": 1},
        "fit": {"steps": 12, "best_step": None, "seconds": 1.0},
        "base": {"model": base, "hash": "b" * 64},
    }
    (folder / RUN_FILE).write_text(json.dumps(own | facts))
    return Run(folder)


def test_metrics_stand_by_language_and_missing_numbers_stay_empty() -> None:
    console = paper()
    show_numbers({"before": BEFORE, "after": AFTER}, "tiny", console)
    assert cells(console) == {
        "": ["en base", "en tiny", "change", "ko base", "ko tiny", "change"],
        "loss": ["2.000", "2.000", "+0.0 %", "4.000", "1.000", "-75.0 %"],
        "chrf": ["", "", "", "11.000", "22.000", ""],
        "ended": ["", "0.500", "", "", "", ""],
    }


def test_where_nothing_was_before_only_the_runs_own_numbers_are_shown() -> None:
    console = paper()
    show_numbers({"before": {}, "after": AFTER}, "tiny", console)
    assert cells(console) == {
        "": ["en tiny", "ko tiny"], "loss": ["2.000", "1.000"], "chrf": ["", "22.000"], "ended": ["0.500", ""],
    }  # fmt: skip


def test_without_held_out_talk_there_is_a_sentence_and_no_table() -> None:
    console = paper()
    show_numbers({"before": {}, "after": {"samples": []}}, "tiny", console)
    assert written(console) == "No held-out talk, so nothing was measured.\n"


def test_what_to_do_next_can_be_copied(tmp_path: Path) -> None:
    sample = {"name": "1", "lang": "ko", "prompt": "뭐 [bold]해", "answer": "아무것도", "finish": "stop", "n_tokens": 3}
    results = {
        "before": {**BEFORE, "samples": [sample | {"answer": "네?"}]},
        "after": {**AFTER, "samples": [sample]},
    }
    run = make_run(tmp_path / "내 것 [red]" / ("긴" * 30), results=results)
    console = paper(width=60)
    show_result(run, console)
    said = written(console)
    for line in (
        f"python -m toolkit chat '{run.path}'  ",
        f"python -m serve '{run.path}'  ",
        f"'{run.path}/samples.md': every",
    ):
        assert line in said
    assert "ko  뭐 [bold]해" in said and "base   네?" in said and "now    아무것도" in said


@pytest.mark.parametrize(
    ("base", "heading"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 'base_model: "Qwen/Qwen2.5-0.5B-Instruct"'),
        ("qwen2.5-0.5b", 'base_model: "Qwen/Qwen2.5-0.5B-Instruct"'),
        ("someone/own-model", 'base_model: "someone/own-model"'),
        ("spoken-mini", None),
        ("./someone/own-model", None),
        ("/models/own", None),
        ("new", None),
    ],
)
def test_a_card_names_its_base_to_a_hub_only_by_a_hub_id(base: str, heading: str | None, tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", base)
    write_card(run)
    top = (run.path / "README.md").read_text().split("---")[1].strip().splitlines()
    assert [line for line in top if line.startswith("base_model")] == ([heading] if heading else [])


def test_a_folder_that_reads_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone" / "own-model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "tiny", "someone/own-model")
    write_card(run)
    assert "base_model:" not in (run.path / "README.md").read_text()


@pytest.mark.parametrize(
    ("valid", "test", "says"),
    [
        (5, 3, "watched on 5, judged by 3;"),
        (5, 0, "watched on 5 and judged by the same (valid"),
        (0, 0, "conversations; no held-out talk;"),
    ],
)
def test_a_card_says_what_it_was_judged_by(valid: int, test: int, says: str, tmp_path: Path) -> None:
    results = {"before": BEFORE, "after": AFTER} if valid else {"before": {}, "after": {}}
    parts = {"train": 40, "valid": valid, "test": test}
    run = make_run(tmp_path / "tiny", data={"parts": parts}, results=results)
    write_card(run)
    card = (run.path / "README.md").read_text()
    assert says in card
    assert ("nothing was measured" in card) == (not valid)


def talk(words: str, lang: str | None = "ko", label: str | None = None, source: str = "말.jsonl:1") -> Talk:
    return Talk((Turn("user", words), Turn("assistant", "응")), source, label, lang)


def key(held: Held, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    base: Any = SimpleNamespace(hash="abc", device=torch.device(device), dtype=dtype)
    renderer: Any = SimpleNamespace(template="본")
    return Judge("classify", base, renderer, held, judging.Sampling())._key()


def test_a_kept_measurement_is_of_the_same_talk_labels_languages_and_place() -> None:
    held = Held((talk("안녕", label="인사"),), (), (), ("인사",), (talk("하나", label="인사"),))
    same = replace(held, talks=(talk("안녕", label="인사", source="다른 곳.jsonl:7"),))
    assert key(held) == key(same)
    others = [
        key(replace(held, learned=(talk("둘", label="인사"),))),
        key(replace(held, learned=(talk("하나", label="작별"),))),
        key(replace(held, learned=())),
        key(replace(held, talks=(talk("안녕", lang="en", label="인사"),))),
        key(replace(held, metrics=("loss",))),
        key(held, device="meta"),
        key(held, dtype=torch.bfloat16),
    ]
    assert len({key(held), *others}) == len(others) + 1


def read(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = maltu(["evaluate", *arguments])
    return (code, *capsys.readouterr())


Trained = Callable[..., Path]


@pytest.fixture
def trained(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Train the tiny recipe and give back its run."""
    monkeypatch.setenv("COLUMNS", "160")

    def start(*overrides: str) -> Path:
        few = ["train.max_steps=2", "train.batch_size=2", *overrides]
        assert train([str(recipe_file), *few, "--runs", str(tmp_path / "runs"), "--quiet"]) == 0
        return tmp_path / "runs" / "tiny"

    return start


@pytest.mark.slow
def test_evaluate_measures_files_as_the_run_was_trained(
    trained: Trained,
    talk_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trained("train.max_length=64", "data.clean.too_long=drop", "data.clean.max_dropped=0.5")
    long = {"role": "user", "content": "길다 " * 100}, {"role": "assistant", "content": "응"}
    rows = talk_file.read_text().splitlines()[:4]
    other = tmp_path / "다른.jsonl"
    other.write_text("\n".join([*rows, rows[0], json.dumps({"messages": long}, ensure_ascii=False)]) + "\n")
    code, out, _ = read(capsys, str(run), "--data", str(other), "--device", "cpu")
    assert code == 0
    assert "Measured on 4 of 6 conversations; dropped: exact_duplicate 1, too_long 1.\n" in out
    assert out.count("Measured on") == 1
    assert "base" in out and "content loss" in out

    opened = judging.load_run

    def without_base(*arguments: Any, with_adapter: bool = True) -> Any:
        if not with_adapter:
            raise RunError("no bare base.")
        return opened(*arguments)

    monkeypatch.setattr(judging, "load_run", without_base)
    code, out, _ = read(capsys, str(run), "--data", str(other), "--device", "cpu")
    assert code == 0
    assert "no bare base. Only the run's own numbers are shown.\n" in out
    assert "ko tiny" in out and "ko base" not in out


@pytest.mark.slow
def test_evaluate_names_what_is_wrong_with_files(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained()
    other = tmp_path / "다른.jsonl"
    other.write_text('{"messages": 3}\n')
    code, _, err = read(capsys, str(run), "--data", str(other), "--device", "cpu")
    assert code == 2 and f"{other}:1" in err.replace("\n", "")


@pytest.mark.slow
def test_a_classifier_is_compared_with_no_baseline_that_saw_the_texts(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [("좋다", "긍정"), ("싫다", "부정")]
    rows = [{"text": f"정말 {words[i % 2][0]} {i * 37 % 101}", "label": words[i % 2][1]} for i in range(40)]
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    named = "data.format={kind: labels, text: text, label: label}"
    run = trained("task=classify", f"data.train=[{file}]", named)
    assert "naive Bayes" in json.dumps(json.loads((run / RUN_FILE).read_text())["results"])
    code, out, _ = read(capsys, str(run), "--data", str(file), "--device", "cpu")
    assert code == 0
    assert "accuracy" in out and "naive Bayes" not in out and "majority" not in out


@pytest.mark.slow
def test_a_base_from_scratch_is_measured_in_pieces_of_its_context(
    trained: Trained, talk_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = "base={new: {hidden: 32, layers: 1, heads: 2, vocab: 300, context: 64}}"
    run = trained(shape, "adapter={kind: full}")
    measured: list[Any] = []
    measure = subject.held_out_loss

    def seen(model: Any, tokenizer: Any, rows: Any, langs: Any) -> Any:
        measured.append(rows)
        return measure(model, tokenizer, rows, langs)

    monkeypatch.setattr(subject, "held_out_loss", seen)
    code, out, err = read(capsys, str(run), "--data", str(talk_file), "--device", "cpu")
    assert code == 0, err
    assert "Measured on 48 of 48 conversations; dropped: none.\n" in out
    assert "no bare base to open. Only the run's own numbers are shown.\n" in out
    assert len(measured) == 1 and len(measured[0]) > 48  # some are longer than the context
    assert max(len(row.input_ids) for row in measured[0]) == 64
    assert all(row.labels[1:] == row.input_ids[1:] for row in measured[0])  # the users' words as well


@pytest.mark.slow
def test_where_every_parameter_was_trained_before_is_the_bare_base(
    trained: Trained, talk_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained("adapter={kind: full}", "train.learning_rate=0.0003")
    shown: list[dict[str, Any]] = []
    monkeypatch.setattr(judging, "show_numbers", lambda results, name, console: shown.append(results))
    code, _, err = read(capsys, str(run), "--data", str(talk_file), "--device", "cpu")
    assert code == 0, err
    assert shown[0]["after"]["loss"]["all"] < shown[0]["before"]["loss"]["all"]
