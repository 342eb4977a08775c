"""A run of several adapters, from the recipe to a run that is chatted with, measured and exported."""

import argparse
import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.combining_world import place as _place
from tests.combining_world import train, write_recipe
from toolkit import combining, judge, pipeline
from toolkit.bundle import Run
from toolkit.chat import Conversation
from toolkit.combine.gate import Gate, gated
from toolkit.combine.merge import merge
from toolkit.combine.mix import Mix
from toolkit.combine.speaker import open_speaker, speaks
from toolkit.corpus.known import mark
from toolkit.corpus.talk import Turn
from toolkit.ensemble import make
from toolkit.ensemble.ground import open_ground
from toolkit.errors import RecipeError, RunError
from toolkit.generate import Sampling, generate
from toolkit.loaded import load_run
from toolkit.recipe.read import read_recipe
from toolkit.steps import INTERRUPTED, Options
from toolkit.track import read_metrics

place = _place
GREEDY = Sampling(temperature=0.0, max_tokens=6)
ASKED = [Turn("user", "밥 먹었어?")]


def chat_with(run: Run) -> str:
    """One answer in the terminal's way."""
    speaker, loaded = open_speaker(run.path, "cpu")
    talk = Conversation(loaded, GREEDY, speaker=speaker, turns=list(ASKED))
    return "".join(talk.answer(lambda: False))


@pytest.mark.slow
def test_a_merge_is_a_run_of_one_adapter(place: Path) -> None:
    """Served, exported and continued like any other."""
    run = train(place, write_recipe(place, "{kind: merge}"))
    facts = run.finished("combination", "experts", "results")
    assert run.adapters() == ("casual", "main", "polite")
    assert not speaks(run.path)
    assert facts["combination"]["weights"] == {"casual": 0.5, "polite": 0.5}
    assert set(facts["experts"]) == {"casual", "polite"}
    verdict = facts["combination"]["verdict"]
    assert verdict["best"] == min(
        ("casual", "polite"), key=lambda name: facts["experts"][name]["results"]["loss"]["all"]
    )
    assert verdict["of_combination"] == pytest.approx(facts["results"]["after"]["loss"]["all"])
    assert "cannot be told from so few" in verdict["sentence"] and not verdict["helps"]
    assert set(facts["combination"]["on"]) == {"casual", "polite"}
    assert set(facts["combination"]["on"]["casual"]) == {"combination", "casual", "polite"}
    assert load_run(run.path, "cpu").run.name == "여럿"


@pytest.mark.slow
def test_a_mix_answers_as_the_mixture_does_and_no_single_model_stands_for_it(place: Path) -> None:
    """Its distribution is that of both; its members can be opened alone."""
    run = train(place, write_recipe(place, "{kind: mix, over: prob, weights: {casual: 3, polite: 1}}"))
    assert run.facts()["combination"]["weights"] == {"casual": 0.75, "polite": 0.25}
    with pytest.raises(RunError, match="several adapters answer together"):
        load_run(run.path, "cpu")
    speaker, loaded = open_speaker(run.path, "cpu")
    prompt = loaded.renderer.prompt(ASKED)
    mix = Mix.of(["casual", "polite"], [0.75, 0.25], "prob")
    wanted = mix.answer(speaker.stack, loaded.base.tokenizer, [prompt], GREEDY)
    assert speaker.answer([ASKED], GREEDY)[0].ids == wanted[0].ids
    assert chat_with(run).strip() == wanted[0].text.strip()
    alone = load_run(run.path, "cpu", "polite")
    said = generate(alone.model, loaded.base.tokenizer, [prompt], GREEDY, ends=alone.ends)[0]
    with speaker.alone("polite") as model:
        assert generate(model, loaded.base.tokenizer, [prompt], GREEDY, ends=alone.ends)[0].ids == said.ids


@pytest.mark.slow
def test_without_a_combination_the_best_expert_answers(place: Path) -> None:
    """And says so."""
    run = train(place, write_recipe(place, ""))
    best = run.facts()["best"]
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        assert (run.adapter("main") / name).read_bytes() == (run.adapter(best) / name).read_bytes()
    assert f"{best} is best" in (run.path / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_expert_that_exists_is_taken_in_and_what_it_learned_judges_nobody(place: Path) -> None:
    """The run works when the other is gone."""
    first = train(place, write_recipe(place, "", name="먼저"))
    path = write_recipe(
        place, "{kind: mix}", "{casual: {data: {train: [casual.jsonl]}}, old: {run: runs/먼저}}", name="둘째"
    )
    run = train(place, path)
    facts = run.facts()
    assert facts["experts"]["old"]["run"] == "runs/먼저" or facts["experts"]["old"]["run"].endswith("먼저")
    assert run.adapters() == ("casual", "old")
    learned = first.facts()["data"]["parts"]["train"]
    assert 0 < facts["data"]["parts"]["test"] <= 48 - learned
    kept = json.loads((run.path / "learned.json").read_text(encoding="utf-8"))["marks"]
    assert set(kept) >= set(json.loads((first.path / "learned.json").read_text(encoding="utf-8"))["marks"])
    before = open_speaker(run.path, "cpu")[0].answer([ASKED], GREEDY)[0].ids
    (place / "runs" / "먼저").rename(place / "gone")
    assert open_speaker(run.path, "cpu")[0].answer([ASKED], GREEDY)[0].ids == before


@pytest.mark.slow
def test_the_same_command_again_says_so_and_another_combination_is_refused(place: Path) -> None:
    """Finished and unchanged: exit 0; changed: what changed."""
    path = write_recipe(place, "{kind: mix}")
    train(place, path)
    train(place, path)
    write_recipe(place, "{kind: mix, over: prob}")
    with pytest.raises(RunError, match=r"combine\.over"):
        train(place, path)


@pytest.mark.slow
def test_a_changed_file_of_an_expert_is_noticed(place: Path) -> None:
    """Not the run's own files alone."""
    path = write_recipe(place, "{kind: mix}")
    train(place, path)
    talk = place / "polite.jsonl"
    talk.write_text(talk.read_text(encoding="utf-8").replace("식사", "점심"), encoding="utf-8")
    with pytest.raises(RunError, match=r"polite\.jsonl"):
        train(place, path)


@pytest.mark.slow
def test_an_expert_of_another_base_has_no_place_in_a_mix(place: Path) -> None:
    """Only a vote joins bases."""
    train(place, write_recipe(place, "", name="먼저"))
    other = "{casual: {data: {train: [casual.jsonl]}}, old: {run: runs/먼저}}"
    path = write_recipe(place, "{kind: mix}", other, name="둘째")
    text = path.read_text(encoding="utf-8").replace("./base", "spoken-mini")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="another base"):
        train(place, path)


@pytest.mark.slow
def test_labels_are_voted_on(place: Path) -> None:
    """Members of different kinds; the vote's numbers are its own."""
    experts = "{one: {train: {seed: 1}}, two: {adapter: {kind: prefix, tokens: 4}}}"
    run = train(place, write_recipe(place, "{kind: vote, how: soft}", experts, more="labels"))
    facts = run.facts()
    assert {"accuracy", "macro f1", "log loss"} <= set(facts["results"]["after"])
    assert facts["combination"]["verdict"]["measure"] == "error rate"
    assert facts["labels"] == ["반말", "존댓말"]


@pytest.mark.slow
def test_a_bag_votes_and_knows_itself_by_what_it_left_out(place: Path) -> None:
    """Members of one recipe, side by side."""
    run = train(place, write_recipe(place, "{kind: bag, members: 3, vote: logprob}", "none"))
    facts = run.facts()
    assert run.adapters() == ("member-1", "member-2", "member-3")
    assert facts["combination"]["report"]["out of bag"]["n"] > 0
    assert facts["combination"]["verdict"]["n"] == facts["data"]["parts"]["test"]
    speaker, loaded = open_speaker(run.path, "cpu")
    prompt = loaded.renderer.prompt(ASKED)
    wanted = Mix.of(run.adapters()).answer(speaker.stack, loaded.base.tokenizer, [prompt], GREEDY)
    assert speaker.answer([ASKED], GREEDY)[0].ids == wanted[0].ids


@pytest.mark.slow
def test_boosting_goes_round_by_round(place: Path) -> None:
    """Labels: the vote of the rounds is the run's answer."""
    run = train(place, write_recipe(place, "{kind: boost, rounds: 2}", "none", more="labels"))
    facts = run.facts()
    assert facts["combination"]["report"]["rounds"]
    assert set(facts["combination"]["weights"]) == set(run.adapters())
    assert "accuracy" in facts["results"]["after"]


@pytest.mark.slow
def test_a_gate_weighs_experts_inside_the_layers(place: Path) -> None:
    """And is opened again with the run."""
    run = train(place, write_recipe(place, "{kind: gate, epochs: 0.5}"))
    facts = run.facts()
    assert (run.path / "gate" / "gate.json").is_file()
    assert facts["combination"]["report"]["load"]
    speaker, loaded = open_speaker(run.path, "cpu")
    prompt = loaded.renderer.prompt(ASKED)
    with gated(speaker.stack, Gate.load(run.path / "gate")) as model:
        wanted = generate(model, loaded.base.tokenizer, [prompt], GREEDY, ends=loaded.ends)
    assert speaker.answer([ASKED], GREEDY)[0].ids == wanted[0].ids


@pytest.mark.slow
def test_bases_vote_together(place: Path) -> None:
    """A member on a base of its own is a run inside the run."""
    experts = (
        "{tuned: {}, fresh: {base: {new: {hidden: 32, layers: 1, heads: 2, vocab: 400, context: 64}},"
        " adapter: {kind: full}}}"
    )
    run = train(place, write_recipe(place, "{kind: vote, how: logprob}", experts, more="labels"))
    assert (run.path / "experts" / "fresh" / "run.json").is_file()
    assert run.facts()["combination"]["members"] == ["tuned", "fresh"]
    speaker, _ = open_speaker(run.path, "cpu")
    assert speaker.is_whole
    own = speaker.apart["fresh"]
    said = [generate(own.model, own.base.tokenizer, [own.renderer.prompt(ASKED)], GREEDY, ends=own.ends)[0].text]
    with speaker.alone("tuned") as model:
        prompt = speaker.renderer.prompt(ASKED)
        said.append(generate(model, speaker.base.tokenizer, [prompt], GREEDY)[0].text)
    assert speaker.answer([ASKED], GREEDY)[0].text in said
    assert run.facts()["experts"]["fresh"]["fit"]["steps"] == 8
    assert judge.evaluate(argparse.Namespace(run=run.path, data=["labels.jsonl"], device="cpu")) == 0


@pytest.mark.slow
def test_a_route_sends_a_talk_to_the_voice_that_fits_it(place: Path) -> None:
    """And the terminal says who answers."""
    run = train(place, write_recipe(place, "{kind: route, default: casual}"))
    facts = run.facts()
    assert (run.path / "router" / "router.json").is_file()
    assert facts["combination"]["default"] == "casual"
    assert facts["combination"]["report"]["all"]["n"] > 0
    speaker, loaded = open_speaker(run.path, "cpu")
    choice = speaker.pick([ASKED])[0]
    with speaker.alone(choice.expert) as model:
        wanted = generate(model, loaded.base.tokenizer, [loaded.renderer.prompt(ASKED)], GREEDY, ends=loaded.ends)
    assert speaker.answer([ASKED], GREEDY)[0].ids == wanted[0].ids
    assert chat_with(run).strip() == wanted[0].text.strip()


@pytest.mark.slow
def test_what_a_run_learned_under_a_system_turn_judges_no_combination_of_it(place: Path) -> None:
    """Nor when it learned it as an expert of a combination."""
    alone = write_recipe(place, "", name="먼저")
    told = alone.read_text(encoding="utf-8").replace("data: {", "data: {system: 친구처럼, train: [casual.jsonl], ")
    alone.write_text(told.split("experts:")[0], encoding="utf-8")
    recipe = read_recipe(alone)
    assert pipeline.run(recipe, Options(place / "runs", quiet=True)) == 0
    learned = set(json.loads((place / "runs" / "먼저" / "learned.json").read_text(encoding="utf-8"))["marks"])
    experts = "{polite: {data: {train: [polite.jsonl]}}, old: {run: runs/먼저}}"
    ground = open_ground(read_recipe(write_recipe(place, "{kind: mix}", experts, name="둘째")))
    held = {mark(talk) for part in (ground.corpus.valid, ground.corpus.test) for talk in part}
    assert held and learned and not held & learned


@pytest.mark.slow
def test_an_existing_adapter_that_does_not_fit_is_told_before_anybody_is_trained(place: Path) -> None:
    """A prefix under a gate; a run that does not say what it learned."""
    prefix = "{casual: {adapter: {kind: prefix, tokens: 4}, data: {train: [casual.jsonl]}}}"
    first = train(place, write_recipe(place, "", prefix, name="먼저"))
    both = "{polite: {data: {train: [polite.jsonl]}}, old: {run: runs/먼저}}"
    path = write_recipe(place, "{kind: gate}", both, name="둘째")
    with pytest.raises(RecipeError, match="a gate weighs lora and reft"):
        train(place, path)
    assert not (place / "runs" / "둘째" / "adapters").exists()
    (first.path / "learned.json").unlink()
    with pytest.raises(RecipeError, match="does not say what it learned"):
        train(place, path)


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["{kind: gate, epochs: 1}", "{kind: boost, rounds: 2}"])
def test_everybodys_losses_are_written_and_drawn(place: Path, combine: str) -> None:
    """A curve each in metrics.jsonl and on the page, for trackers too."""
    path = write_recipe(place, combine, "none" if "boost" in combine else "")
    path.write_text(path.read_text(encoding="utf-8").replace("track: []", "track: [tensorboard]"), encoding="utf-8")
    run = train(place, path)
    lines = read_metrics(run.path)
    names = Counter(name for line in lines for name in line)
    learned = run.adapters() if "boost" in combine else ("casual", "polite")
    page = (run.path / "report.html").read_text(encoding="utf-8")
    for name in learned:
        assert names[f"loss/{name}"] == 8 and names[f"valid_loss/{name}"] >= 1
        assert f">{name}<" in page
    assert ("gate/loss" in names) == ("gate" in combine)
    assert any(name.startswith("test/") for name in lines[-1])
    assert 'id="curves"' in page and list((run.path / "tensorboard").glob("events*"))


def test_torchrun_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes would train into one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="not started by torchrun"):
        train(place, write_recipe(place, "{kind: mix}"))


@pytest.mark.slow
def test_a_wish_to_stop_ends_the_search_for_weights_and_the_same_command_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for the last trial."""
    path = write_recipe(place, "{kind: merge, weights: search, trials: 6}")
    recipe, tried = read_recipe(path), []

    def stopping(*given: Any, **named: Any) -> Any:
        tried.append(1)
        if len(tried) == 3:
            signal.raise_signal(signal.SIGTERM)
        return merge(*given, **named)

    monkeypatch.setattr(make, "merge", stopping)
    assert combining.run(recipe, Options(place / "runs", quiet=True)) == INTERRUPTED
    assert len(tried) == 3
    assert train(place, path).facts()["combination"]["report"]["trials"]


@pytest.mark.slow
def test_a_run_whose_files_have_another_format_is_told_so(place: Path) -> None:
    """All files are read by one."""
    train(place, write_recipe(place, "{kind: vote}", "{one: {train: {seed: 1}}, two: {}}", name="먼저", more="labels"))
    both = "{polite: {data: {train: [polite.jsonl]}}, old: {run: runs/먼저}}"
    with pytest.raises(RecipeError, match=r"another data\.format"):
        train(place, write_recipe(place, "{kind: mix}", both, name="둘째"))
