"""A run of several adapters says in the server what it says in chat, whatever its combination is."""

from dataclasses import replace
from pathlib import Path

import pytest

from serve.engines.contract import Ask, Auto, One
from serve.engines.models import open_models
from serve.runs import find_runs
from tests.combining_world import VOICES, place, train, write_recipe  # noqa: F401  # place is a fixture
from tests.served_world import all_said, engine
from toolkit.combine.speaker import open_speaker
from toolkit.corpus.talk import Turn
from toolkit.generate import generate
from toolkit.loaded import load_run
from toolkit.sampling import Sampling

pytestmark = pytest.mark.slow

TALKS = [
    (Turn("user", "밥 먹었어? 3"),),
    (Turn("user", "식사는 하셨습니까? 8"), Turn("assistant", "네"), Turn("user", "have you had lunch 5")),
    (Turn("user", "did you eat 11"),),
]
SAMPLINGS = [Sampling(temperature=0.0, max_tokens=12), Sampling(temperature=0.8, max_tokens=12, seed=4)]
COMBINATIONS = [
    ("mix", "{kind: mix, over: prob, weights: {casual: 0.3, polite: 0.7}}"),
    ("vote", "{kind: vote, how: hard}"),
    ("gate", "{kind: gate, epochs: 1}"),
    ("route", "{kind: route, router: centroid}"),
    ("route", "{kind: route, router: centroid, top_k: 2}"),
]


@pytest.mark.parametrize(("kind", "combine"), COMBINATIONS)
def test_a_run_answers_as_in_chat(place: Path, kind: str, combine: str) -> None:  # noqa: F811
    run = train(place, write_recipe(place, combine, name=f"{kind}s"))
    speaker, _ = open_speaker(run.path, "cpu")
    wanted = [speaker.answer([turns], sampling)[0] for turns in TALKS for sampling in SAMPLINGS]
    models = open_models(find_runs([run.name], run.path.parent), "cpu")
    assert list(models) == ["base", run.name, f"{run.name}/casual", f"{run.name}/polite"]
    asks = [Ask("id", One(run.name), turns, sampling) for turns in TALKS for sampling in SAMPLINGS]
    with engine(models) as served:
        found = all_said(served, asks)
        told = served.models()[run.name]
        assert [answer.ids for answer in found] == [answer.ids for answer in wanted]
        assert told.combination == kind and told.adapter is None
        experts = all_said(served, [Ask("id", One(f"{kind}s/{voice}"), TALKS[0], SAMPLINGS[0]) for voice in VOICES])
        if kind == "route":
            assert all_said(served, [replace(one, who=Auto()) for one in asks]) == found
    for voice, expert in zip(VOICES, experts, strict=True):
        loaded = load_run(run.path, "cpu", voice)
        prompt = loaded.renderer.prompt(TALKS[0])
        alone = generate(loaded.model, loaded.base.tokenizer, [prompt], SAMPLINGS[0], ends=loaded.ends)[0]
        assert alone.ids == expert.ids


def test_a_merge_answers_under_the_name_of_its_run(place: Path) -> None:  # noqa: F811
    run = train(place, write_recipe(place, "{kind: merge}", name="merged"))
    models = open_models(find_runs(["merged"], run.path.parent), "cpu")
    assert {"merged", "merged/casual", "merged/polite"} <= set(models) and models["merged"].spec is None
    loaded = load_run(run.path, "cpu")
    prompt = loaded.renderer.prompt(TALKS[0])
    wanted = generate(loaded.model, loaded.base.tokenizer, [prompt], SAMPLINGS[0], ends=loaded.ends)[0]
    with engine(models) as served:
        assert all_said(served, [Ask("id", One("merged"), TALKS[0], SAMPLINGS[0])])[0].ids == wanted.ids
