"""Who answers for a run that holds several adapters: its combination, applied to talk.

    speaker = open_speaker(Path("runs/tone_experts"))
    with speaker.opened(turns) as model: ...      # an Opened: for generate, stream and score
    answer = speaker.answer([turns], sampling)[0]

A route asks its router about each conversation; a gate weighs experts token by token; a mix is one distribution; a vote
is held over whole answers, which no model can stand for. A merge is none of these: its adapter answers like any other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.adapters.opened import Opened
from toolkit.bases.load import LoadedBase
from toolkit.bundle import Run, open_run
from toolkit.combine.contract import Combination
from toolkit.combine.gate import Gate, gated
from toolkit.combine.mix import Mix
from toolkit.combine.route import BASE, Choice, Router, choose
from toolkit.combine.rows import Apart, answering
from toolkit.combine.vote import VoteOfAnswers, majority
from toolkit.corpus.render import Renderer
from toolkit.corpus.talk import Turn
from toolkit.errors import InputError, Problem, RunError
from toolkit.generate import Answer, Sampling, generate
from toolkit.loaded import LoadedLabeller, LoadedRun, is_labeller, load_labeller, load_run
from toolkit.stack.stack import Stack

PER_TOKEN = {"soft": "prob", "logprob": "logprob"}  # a vote over text, token by token
MAIN = "main"  # the adapter that answers for a run: of a merge, say
ROUTER, GATE = "router", "gate"  # folders of a run


@dataclass(frozen=True)
class Spec:
    """What a run's combination is: run.json's "combination".

    kind: the word in the recipe. how: which of its methods. members: names of adapters, in the order that breaks ties.
    weights: of each, empty for kinds that have none. default, margin, top_k: of a route.
    """

    kind: str
    how: str
    members: tuple[str, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    default: str = BASE
    margin: float = 0.0
    top_k: int = 1

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        more = {"default": self.default, "margin": self.margin, "top_k": self.top_k} if self.kind == "route" else {}
        return {
            "kind": self.kind,
            "how": self.how,
            "members": list(self.members),
            "weights": dict(self.weights),
            **more,
        }


def spec_of(run: Run, facts: Mapping[str, Any]) -> Spec | None:
    """The combination of a run; None for a run of one adapter. Raises: RunError where run.json tells it in part."""
    found = facts.get("combination")
    if found is None:
        return None
    try:
        return Spec(
            str(found["kind"]),
            str(found["how"]),
            tuple(map(str, found["members"])),
            {str(name): float(weight) for name, weight in found["weights"].items()},
            str(found.get("default", BASE)),
            float(found.get("margin", 0.0)),
            int(found.get("top_k", 1)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as broken:
        raise RunError(
            f"{run.path / 'run.json'}: its combination cannot be read ({broken!r}). Restore it from a copy, or train"
            " again with --fresh."
        ) from broken


class Speaker:
    """See the head of this file. Its stack holds all members; one thread at a time may use it."""

    def __init__(
        self,
        base: LoadedBase,
        renderer: Renderer,
        stack: Stack,
        spec: Spec,
        *,
        router: Router | None = None,
        gate: Gate | None = None,
        apart: Mapping[str, LoadedRun | LoadedLabeller] | None = None,
    ) -> None:
        self.base, self.renderer, self.stack, self.spec = base, renderer, stack, spec
        self.router, self.gate, self.apart = router, gate, dict(apart or {})
        missing = [name for name in spec.members if name not in stack.slots and name not in self.apart]
        if missing:
            raise RunError(f"{', '.join(missing)}: no such adapter in the stack. Copy the whole run folder again.")

    @property
    def n_prefix(self) -> int:
        """How many positions of the context a prefix of a member takes at most."""
        stacked = [name for name in self.spec.members if name not in self.apart]
        return max(self.stack.n_prefix(self.stack.owners(stacked)), default=0)

    @property
    def is_whole(self) -> bool:
        """Whether an answer is chosen as a whole, so that there is no next token to ask for."""
        return bool(self.apart) or isinstance(self._combination(), VoteOfAnswers)

    def pick(
        self, conversations: Sequence[Sequence[Turn]], before: Sequence[Choice | None] | None = None
    ) -> list[Choice]:
        """Whom a route sends each conversation to. `before`: whom it was with until now."""
        if self.router is None:
            raise RunError(f"{self.spec.kind}: this combination has no router.")
        probabilities = self.router.probabilities(self.base.model, self.base.tokenizer, conversations)
        earlier = before if before is not None else [None] * len(conversations)
        return [
            choose(
                row,
                self.router.experts,
                before=one,
                top_k=self.spec.top_k,
                default=self.spec.default,
                margin=self.spec.margin,
            )
            for row, one in zip(probabilities, earlier, strict=True)
        ]

    @contextmanager
    def opened(self, chosen: Choice | None = None) -> Iterator[Opened]:
        """The combination as one model for measuring; of a route the experts that were chosen.

        Raises: InputError for a vote over whole answers, which has no next token.
        """
        spec, combination = self.spec, self._combination()
        if chosen is not None:
            with self._chosen(chosen) as model:
                yield model
        elif spec.kind == "gate" and self.gate is not None:
            with gated(self.stack, self.gate) as model:
                yield model
        elif isinstance(combination, Mix):
            with combination.opened(self.stack) as model:
                yield model
        else:
            says = f"a {spec.kind} ({spec.how}) has no next token: it is held over whole answers, or over labels."
            raise InputError("combination", [Problem("", says)])

    @contextmanager
    def alone(self, name: str | None) -> Iterator[Opened]:
        """One member as a model for measuring; None: the base."""
        with answering(self.stack, [name], Apart) as model:
            yield model

    def answer(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling) -> list[Answer]:
        """An answer to each conversation, in order."""
        if self.apart:
            return self._voted_apart(conversations, sampling)
        prompts = [self.renderer.prompt(turns) for turns in conversations]
        ends = frozenset(self.renderer.stop_ids)
        combination = self._combination()
        if combination is not None:
            return combination.answer(self.stack, self.base.tokenizer, prompts, sampling, ends=ends)
        if self.spec.kind != "route":
            with self.opened() as model:
                return generate(model, self.base.tokenizer, prompts, sampling, ends=ends)
        choices = self.pick(conversations)
        found: list[Answer | None] = [None] * len(prompts)
        for key in dict.fromkeys(map(_key, choices)):
            mine = [place for place, choice in enumerate(choices) if _key(choice) == key]
            with self.opened(choices[mine[0]]) as model:
                said = generate(model, self.base.tokenizer, [prompts[place] for place in mine], sampling, ends=ends)
            for place, answer in zip(mine, said, strict=True):
                found[place] = answer
        return [answer for answer in found if answer is not None]

    def _voted_apart(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling) -> list[Answer]:
        """Members on different bases answer one after another; the majority of each conversation's answers."""
        said = []
        for name in self.spec.members:
            if name in self.apart:
                own = self.apart[name]
                if isinstance(own, LoadedLabeller):
                    raise RunError(f"{name}: it labels texts; it cannot talk. This vote is over labels alone.")
                prompts = [own.renderer.prompt(turns) for turns in conversations]
                said.append(generate(own.model, own.base.tokenizer, prompts, sampling, ends=own.ends))
                continue
            prompts = [self.renderer.prompt(turns) for turns in conversations]
            with self.alone(name) as model:
                ends = frozenset(self.renderer.stop_ids)
                said.append(generate(model, self.base.tokenizer, prompts, sampling, ends=ends))
        weights = [self.spec.weights[name] for name in self.spec.members]
        return [of[majority([answer.text for answer in of], weights).member] for of in zip(*said, strict=True)]

    @contextmanager
    def _chosen(self, choice: Choice) -> Iterator[Opened]:
        names = [name for name, weight in choice.weights.items() if weight]
        if len(names) < 2:
            with self.alone(choice.expert) as model:
                yield model
            return
        with Mix.of(names, [choice.weights[name] for name in names]).opened(self.stack) as model:
            yield model

    def _combination(self) -> Combination | None:
        """A mix or a vote with its weights; None for the other kinds."""
        spec = self.spec
        if spec.kind == "mix":
            return Mix.of(spec.members, dict(spec.weights), spec.how)  # type: ignore[arg-type]  # checked by it
        if spec.kind not in ("vote", "bag", "boost"):
            return None
        if spec.how in PER_TOKEN:
            return Mix.of(spec.members, dict(spec.weights), PER_TOKEN[spec.how])  # type: ignore[arg-type]
        return VoteOfAnswers.of(spec.members, dict(spec.weights))


def _key(choice: Choice) -> tuple[Any, ...]:
    """What conversations with the same experts at the same weights have in common."""
    return (choice.expert, *sorted(choice.weights.items()))


def speaks(path: Path | str) -> bool:
    """Whether several adapters of a run answer together, so that no single one answers for it. Raises: RunError."""
    run = open_run(path)
    return spec_of(run, run.facts()) is not None and MAIN not in run.adapters()


def open_speaker(path: Path | str, device: str = "auto") -> tuple[Speaker, LoadedRun]:
    """The combination of a finished run, and the run with its bare base.

    Raises: RunError for a run without a combination or with a damaged one, and as `load_run` does.
    """
    loaded = load_run(path, device, with_adapter=False)
    spec = spec_of(loaded.run, loaded.facts)
    if spec is None:
        raise RunError(f"{loaded.run.path}: has one adapter and no combination of several. Open it as it is.")
    stack = Stack(loaded.base.model, base_hash=loaded.base.hash)
    apart = {}
    for name in spec.members:
        if own_run(loaded.run, name).is_dir():
            apart[name] = open_apart(own_run(loaded.run, name), device)
        else:
            stack.add(name, loaded.run.adapter(name))
    router = Router.load(loaded.run.path / ROUTER) if spec.kind == "route" else None
    gate = Gate.load(loaded.run.path / GATE) if spec.kind == "gate" else None
    return Speaker(loaded.base, loaded.renderer, stack, spec, router=router, gate=gate, apart=apart), loaded


def open_apart(path: Path, device: str = "auto") -> LoadedRun | LoadedLabeller:
    """A member that is a run of its own, an encoder that labels among them. Raises: as opening it does."""
    return load_labeller(path, device) if is_labeller(open_run(path).facts()) else load_run(path, device)


def own_run(run: Run, member: str) -> Path:
    """Where a member that is a run of its own lies: one on another base, or a whole model."""
    return run.path / "experts" / member
