"""Whom a router sends a conversation to: asked once for every request, by all that was said so far.

A conversation stays with its expert until another one wins by the run's margin. It is known again by how it begins: a
request that goes on from the turns of an earlier one of the same key belongs to the same conversation.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from serve.engines.contract import Ask, One
from serve.engines.models import Model
from serve.engines.teams import Team, team_of, together
from serve.names import BASE
from toolkit.combine.route import Choice, choose
from toolkit.corpus.talk import Turn
from toolkit.disk import hash_text

N_KEPT = 4096  # conversations that are remembered


class Routing:
    """The choices of the last conversations. One thread."""

    def __init__(self, n_kept: int = N_KEPT) -> None:
        self._n_kept = n_kept
        self._chosen: OrderedDict[str, Choice] = OrderedDict()

    def team(self, models: Mapping[str, Model], run: Model, ask: Ask) -> Team:
        """Who answers. Cost: what the router's features cost, a part of a forward pass over the last turns."""
        choice = self.choice(run, ask)
        names = {name: _name(run, name) for name in choice.weights}
        weights = [(names[name], weight) for name, weight in choice.weights.items() if weight]
        if len(weights) > 1:
            team = together(models, "mix", weights)
        else:
            team = team_of(models, One(_name(run, choice.expert)))
            weights = [(team.served.name, 1.0)]
        return replace(team, routing=tuple(weights))

    def choice(self, run: Model, ask: Ask) -> Choice:
        """What the router says about the conversation as it is now."""
        router, spec = run.router, run.spec
        assert router is not None and spec is not None
        base = run.loaded.base
        row = router.probabilities(base.model, base.tokenizer, [ask.turns])[0]
        before = next((self._chosen[key] for key in _keys(run, ask, ask.turns[:-1]) if key in self._chosen), None)
        found = choose(
            row, router.experts, before=before, top_k=spec.top_k, default=spec.default or BASE, margin=spec.margin
        )
        key = next(_keys(run, ask, ask.turns))
        self._chosen[key] = found
        self._chosen.move_to_end(key)
        while len(self._chosen) > self._n_kept:
            self._chosen.popitem(last=False)
        return found


def _name(run: Model, expert: str | None) -> str:
    """What an expert of a run is called here."""
    return BASE if expert in (None, BASE) else f"{run.served.name}/{expert}"


def _keys(run: Model, ask: Ask, turns: Sequence[Turn]) -> Iterator[str]:
    """What a conversation is known by: all its turns, then fewer and fewer of them."""
    for n_turns in range(len(turns), 0, -1):
        said = "\n".join(f"{turn.role} {len(turn.content)} {turn.content}" for turn in turns[:n_turns])
        yield hash_text(f"{run.served.name}\n{run.served.weights_hash}\n{ask.key}\n{said}")
