"""What a run of several adapters needs from elsewhere: other runs, and texts that each member reads."""

import json
import random
import shutil
from pathlib import Path

import pytest

from tests.combining_world import VOICES, train, write_labels, write_recipe
from tests.combining_world import place as _place
from tests.encoder_world import save_encoder
from toolkit.errors import RecipeError, RunError

place = _place


@pytest.mark.slow
def test_a_finished_run_answers_from_its_own_folder_when_a_source_is_gone(place: Path) -> None:
    """What has changed otherwise is still told; a run that needs the source says what is missing."""
    train(place, write_recipe(place, "", name="먼저"))
    both = "{casual: {data: {train: [casual.jsonl]}}, old: {run: runs/먼저}}"
    path = write_recipe(place, "{kind: mix}", both, name="둘째")
    train(place, path)
    (place / "runs" / "먼저").rename(place / "gone")
    train(place, path)
    with pytest.raises(RecipeError, match=r"experts\.old\.run: there is no run in runs/먼저"):
        train(place, path, fresh=True)
    assert (place / "runs" / "둘째" / "run.json").is_file()
    with pytest.raises(RecipeError, match=r"experts\.old\.run: there is no run"):
        train(place, write_recipe(place, "{kind: mix}", both, name="셋째"))
    write_recipe(place, "{kind: mix, over: prob}", both, name="둘째")
    with pytest.raises(RunError, match=r"combine\.over"):
        train(place, path)
    write_recipe(place, "{kind: mix}", both, name="둘째")
    talk = place / "casual.jsonl"
    talk.write_text(talk.read_text(encoding="utf-8").replace("응", "어"), encoding="utf-8")
    with pytest.raises(RunError, match=r"casual\.jsonl"):
        train(place, path)


@pytest.mark.slow
def test_a_finished_run_of_sources_alone_answers_when_they_are_gone(place: Path) -> None:
    """Its talk is theirs, and is known from its own recipe."""
    for name in VOICES:
        own = f"{{one: {{data: {{train: [{name}.jsonl]}}}}}}"
        train(place, write_recipe(place, "", own, name=f"{name}-alone"))
    both = "{casual: {run: runs/casual-alone}, polite: {run: runs/polite-alone}}"
    path = write_recipe(place, "{kind: mix}", both, name="둘째")
    told = path.read_text(encoding="utf-8").replace("data: {", "data: {valid: 0, test: 0, ")
    path.write_text(told, encoding="utf-8")
    train(place, path)
    shutil.rmtree(place / "runs" / "casual-alone")
    train(place, path)
    shutil.rmtree(place / "runs" / "polite-alone")
    train(place, path)


FRESH = "fresh: {base: {new: {hidden: 32, layers: 1, heads: 2, vocab: 400, context: 64}}, adapter: {kind: full}}"
SIGNS = "가나다라마바사아자차카타파하"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experts", "says"),
    [
        (f"{{tuned: {{}}, {FRESH}}}", r"experts\.fresh: \d+ of \d+ texts .* too long for its own base: .* it reads 64"),
        ("{tuned: {}, reader: {base: {model: ./encoder}}}", r"experts\.reader: .*more than 48 tokens"),
        (
            "{tuned: {}, far: {adapter: {kind: prefix, tokens: 200}}}",
            r"experts\.far: \d+ of \d+ texts .* it reads 256, 200 of which its prefix takes",
        ),
    ],
)
def test_a_text_too_long_for_one_member_is_told_before_anything_trains(place: Path, experts: str, says: str) -> None:
    """It fits one base and not the other, or leaves no room beside a prefix."""
    save_encoder(place / "encoder")
    path = write_recipe(place, "{kind: vote}", experts, more="labels")
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(SIGNS, k=60)), "label": "하나" if i % 2 else "둘"} for i in range(48)]
    (place / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(RecipeError, match=says):
        train(place, path)
    assert not list((place / "runs" / "여럿").glob("[!.]*"))


@pytest.mark.slow
def test_a_member_that_chooses_from_other_labels_is_told_before_anything_trains(place: Path) -> None:
    """A run that exists on a base of its own."""
    other = write_recipe(place, "{kind: vote}", f"{{tuned: {{}}, {FRESH}}}", name="먼저", more="labels")
    rows = [{"text": f"{i} 뭐", "label": "하나" if i % 2 else "둘"} for i in range(48)]
    (place / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train(place, other)
    write_labels(place / "labels.jsonl")
    old = "{tuned: {}, old: {run: runs/먼저/experts/fresh}}"
    with pytest.raises(RecipeError, match=r"experts\.old: .*does not know"):
        train(place, write_recipe(place, "{kind: vote}", old, name="둘째", more="labels"))
    assert not (place / "runs" / "둘째" / "adapters").exists()
