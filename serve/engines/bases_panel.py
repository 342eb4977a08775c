"""The members of a run that stand on bases of their own: opened once each, and what each of them says when asked alone.

A vote over bases, or a run of an encoder alone. What a member says is what the toolkit finds of it (combine/speaker.py,
evaluate/classify.py); what several say is voted on as there. Members on one base hold its weights in common.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import nn

from serve.engines.contract import Ask, Auto, Mix, Served, Vote, Who
from serve.engines.models import adapter_hash, describe, share_weights
from serve.engines.row import prompt_of
from serve.refusal import Refusal, no_model, no_router, unsupported
from toolkit.adapters import anatomy
from toolkit.adapters.opened import Opened, open_model
from toolkit.bundle import RUN_FILE, Run
from toolkit.combine.rows import Apart, answering
from toolkit.combine.speaker import Speaker, Spec, open_speaker
from toolkit.combine.vote import Vote as How
from toolkit.corpus.talk import Talk, Turn
from toolkit.disk import hash_text
from toolkit.errors import BaseError, DataError, InputError
from toolkit.evaluate.classify import classify, common_labels, label_log_likelihoods
from toolkit.loaded import LoadedLabeller, LoadedRun, is_labeller, load_labeller
from toolkit.stack.stack import Stack

MAJORITY: How = "hard"  # what a request's own vote over labels is


@dataclass(frozen=True)
class Member:
    """One who answers. stack: that it stands on, where it shares a base with others; `adapter` is its name there."""

    served: Served
    loaded: LoadedRun | LoadedLabeller
    stack: Stack | None = None
    adapter: str | None = None

    def talking(self) -> LoadedRun:
        """Itself, as one that talks. Raises Refusal: 400 for an encoder."""
        if isinstance(self.loaded, LoadedLabeller):
            says = f"{self.served.name} is an encoder: it labels texts, and cannot talk. Ask /v1/classify."
            raise unsupported("model", says)
        return self.loaded

    @contextmanager
    def opened(self) -> Iterator[nn.Module | Opened]:
        """As a model for writing or scoring."""
        if self.stack is None:
            yield self.loaded.model
            return
        with answering(self.stack, [self.adapter], Apart) as model:
            yield model

    def prompt(self, ask: Ask) -> list[int]:
        """The prompt's ids by its own tokenizer and template. Raises Refusal as `prompt_of` does."""
        own = self.talking()
        n_vocabulary = int(anatomy.text_config(own.base.model).vocab_size)
        return prompt_of(ask, own.renderer, n_vocabulary, self.served.context)

    def label(self, turns: Sequence[Turn], labels: Sequence[str]) -> Mapping[str, float]:
        """The probability of every label. Raises Refusal: 400 for a text that is too long, or no label of its own."""
        try:
            if self.stack is not None:
                with answering(self.stack, [self.adapter], Apart) as model:
                    return classify(model, self.talking().renderer, [turns], labels)[0]
            talk = Talk((*turns, Turn("assistant", labels[0])), "asked", labels[0])
            said_L = label_log_likelihoods(self.loaded, [talk], labels)[0].softmax(-1)
            return dict(zip(labels, said_L.tolist(), strict=True))
        except (BaseError, DataError) as error:
            raise Refusal(400, str(error), "invalid_value", "labels") from None
        except InputError as error:
            raise Refusal(400, f"{self.served.name}: {error}", "context_length_exceeded", "input") from None


@dataclass(frozen=True)
class Asked:
    """Who is asked, those of weight 0 left out: one, or several that vote. how: of a vote over labels."""

    served: Served
    members: tuple[Member, ...]
    weights: tuple[float, ...]
    how: How

    def refuse(self, ask: Ask) -> None:
        """Raise Refusal, 400, for what has no meaning where members have tokenizers of their own, or cannot talk."""
        for member in self.members:
            member.talking()
        if len(self.members) < 2:
            return
        why = f"{self.served.name} is a vote of members with tokenizers of their own"
        if ask.n_logprobs is not None:
            says = f"{why}, whose tokens have no probabilities in common. Leave it out, or ask one: {self._names}."
            raise unsupported("logprobs", says)
        if ask.sampling.logit_bias:
            says = f"{why}, in which a number means other tokens. Leave it out, or ask one: {self._names}."
            raise unsupported("logit_bias", says)

    def prompts(self, ask: Ask) -> list[list[int]]:
        """For each member the prompt's ids. Raises Refusal as `prompt_of` does."""
        return [member.prompt(ask) for member in self.members]

    def labels(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        """The labels to choose from. Raises Refusal: 400 for others than the run was taught."""
        known = self.members[0].loaded.labels
        if not known and not asked:
            says = f"{self.served.name} was not taught labels. Say which there are: labels."
            raise Refusal(400, says, "missing_required_parameter", "labels")
        for member in self.members if asked else ():
            if member.stack is None or known:
                try:
                    common_labels({"labels": tuple(asked or ()), member.served.name: member.loaded.labels})
                except DataError as wrong:
                    raise Refusal(400, str(wrong), "invalid_value", "labels") from None
        return tuple(asked or known)

    @property
    def _names(self) -> str:
        return ", ".join(member.served.name for member in self.members)


@dataclass(frozen=True)
class Panel:
    """All members of a run, and the run. spec: how they vote; None for a run of an encoder alone."""

    run: Run
    served: Served
    members: Mapping[str, Member]
    spec: Spec | None = None

    def models(self) -> dict[str, Served]:
        """Every name that answers: the run, then its members."""
        return {self.served.name: self.served} | {name: member.served for name, member in self.members.items()}

    def asked(self, who: Who) -> Asked:
        """Who is meant. Raises Refusal as Engine.served does."""
        if isinstance(who, Mix):
            says = (
                "A mix weighs every token, and these members have tokenizers of their own. Ask for a vote of them, as"
                f" in vote:{','.join(self.members)}, or for one."
            )
            raise unsupported("model", says)
        if isinstance(who, Auto):
            raise no_router(self.models())
        if isinstance(who, Vote):
            return self._voting(who)
        if who.name in self.members:
            member = self.members[who.name]
            return Asked(member.served, (member,), (1.0,), MAJORITY)
        if who.name != self.served.name or self.spec is None:
            raise no_model(who.name, self.models())
        named = [(self.members[name], weight) for name, weight in self.served.members if weight]
        members, weights = tuple(member for member, _ in named), tuple(weight for _, weight in named)
        return Asked(self.served, members, weights, cast("How", self.spec.how))

    def told(self) -> str:
        """What lies in memory, in a line."""
        loaded = [member.loaded.base for member in self.members.values()]
        bases = list(dict.fromkeys(base.source for base in loaded))
        n = len({base.hash for base in loaded})
        return f"{n} base{'s' * (n > 1)} ({', '.join(bases)}), {self.memory_mb:,.0f} MB of weights"

    @property
    def memory_mb(self) -> float:
        """Of all weights, those that members have in common counted once."""
        models = [member.loaded.model for member in self.members.values()]
        stacks = {id(member.stack): member.stack for member in self.members.values() if member.stack is not None}
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        tensors += [
            tensor
            for stack in stacks.values()
            for name in stack.slots
            for tensor in stack.adapter(name).tensors.values()
        ]
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(sizes.values()) / 2**20

    def _voting(self, who: Vote) -> Asked:
        if self.served.name in who.names and self.spec is not None:
            raise unsupported("model", f"{self.served.name} is a vote already: name its members.")
        for name in who.names:
            if name not in self.members:
                raise no_model(name, self.models())
        if len(set(who.names)) < len(who.names) or not who.names:
            raise Refusal(400, "Name every model once, and at least one.", "invalid_value", "model")
        members = tuple(self.members[name] for name in who.names)
        weights = (1.0 / len(members),) * len(members)
        served = _described(str(who), [one.served for one in members], weights, MAJORITY)
        return Asked(replace(served, task=self.served.task), members, weights, MAJORITY)  # the run's own wording


def open_panel(run: Run, device: str) -> Panel:
    """Open every member of a run. Raises: what open_speaker and load_labeller raise.

    Needs memory for two copies of a base while a second member on it loads.
    """
    facts = run.finished("base")
    if is_labeller(facts):
        labeller = load_labeller(run.path, device)
        own = Member(_served(run.name, run, labeller), labeller)
        return Panel(run, own.served, {run.name: own})
    speaker, loaded = open_speaker(run.path, device)
    members = dict(_members(run, speaker, loaded))
    weights = [speaker.spec.weights.get(name, 0.0) for name in speaker.spec.members]
    told = _described(run.name, [member.served for member in members.values()], weights, speaker.spec.how)
    served = replace(
        told,
        defaults=loaded.sampling,
        task=str(facts.get("task", "chat")),
        created=int((run.path / RUN_FILE).stat().st_mtime),
    )
    return Panel(run, served, members, speaker.spec)


def _members(run: Run, speaker: Speaker, loaded: LoadedRun) -> Iterator[tuple[str, Member]]:
    """Each under its name; the base of a stack and those of others that are the same share their weights."""
    owners: dict[str, nn.Module] = {loaded.base.hash: loaded.base.model}
    for name in speaker.spec.members:
        full = f"{run.name}/{name}"
        if name not in speaker.apart:
            n_prefix = speaker.stack.n_prefix(speaker.stack.owners([name]))[0]
            served = _served(full, run, loaded, run.adapter(name), n_prefix)
            yield full, Member(served, loaded, speaker.stack, name)
            continue
        own = speaker.apart[name]
        for parameter in own.model.parameters():
            parameter.requires_grad_(False)
        owner = owners.setdefault(own.base.hash, own.base.model)
        if owner is not own.base.model:
            share_weights(owner, own.model)
        n_prefix = 0 if isinstance(own, LoadedLabeller) else open_model(own.model).n_prefix
        folder = own.run.adapter() if own.run.adapter().is_dir() else None
        yield full, Member(_served(full, own.run, own, folder, n_prefix), own)


def _served(
    name: str, run: Run, loaded: LoadedRun | LoadedLabeller, folder: Path | None = None, n_prefix: int = 0
) -> Served:
    if isinstance(loaded, LoadedLabeller):
        folder = loaded.run.adapter()
    return Served(
        name=name,
        adapter=name,
        base=loaded.base.source,
        base_hash=loaded.base.hash,
        weights_hash=loaded.base.hash if folder is None else adapter_hash(folder),
        context=loaded.base.context - n_prefix,
        task=str(loaded.facts.get("task", "chat")),
        defaults=loaded.sampling if isinstance(loaded, LoadedRun) else {},
        created=int((run.path / RUN_FILE).stat().st_mtime),
    )


def _described(name: str, members: Sequence[Served], weights: Sequence[float], how: str) -> Served:
    """A vote as one model: its base is all of theirs."""
    told = describe(name, "vote", members, weights, how)
    bases = dict.fromkeys(one.base for one in members)
    hashes = list(dict.fromkeys(one.base_hash for one in members))
    base_hash = hashes[0] if len(hashes) == 1 else hash_text("\n".join(hashes))
    return replace(told, base=", ".join(bases), base_hash=base_hash)
