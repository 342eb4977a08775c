"""What was asked: the recipe with what was changed in it first; how to use the run, and the command that repeats it."""

from collections.abc import Mapping
from typing import Any

import yaml
from markupsafe import Markup

from toolkit.recipe.tree import RecipeDumper
from toolkit.report.markup import EMPTY, code, folded, inline_code, joined, paragraph, section, table, under
from toolkit.report.seen import REQUIRED, Seen
from toolkit.report.words import Say, Words, shortened, told, within

LONGEST = 300  # signs of a value


def asked_section(seen: Seen) -> Markup:
    """The recipe: changed keys in a table, all of it folded."""
    base = within(seen.facts, "base")
    plan = within(seen.facts, "plan")
    rows: list[tuple[Words, ...]] = [
        (inline_code(key), value_text(value), Say("required", "필수") if usual == REQUIRED else value_text(usual))
        for key, (value, usual) in (seen.changed or {}).items()
        if key != "name"
    ]
    changed = table(
        Say("What the recipe sets, beside the defaults", "레시피에 적은 값과 기본값"),
        (Say("key", "키"), Say("this run", "이 실행"), Say("default", "기본값")),
        rows,
        texts=3,
    )
    unread = paragraph(
        Say(
            "The recipe is of another version, so what was changed in it cannot be told.",
            "다른 버전의 레시피라 기본값에서 무엇을 바꾸었는지 알 수 없습니다.",
        ),
        "note",
    )
    return section(
        "asked",
        Say("What was asked", "레시피에 적은 것"),
        _in_short(seen, base, plan),
        unread if seen.changed is None else changed,
        folded(Say("The whole recipe", "레시피 전체"), code(_whole(seen.recipe))),
    )


def _in_short(seen: Seen, base: Mapping[str, Any], plan: Mapping[str, Any]) -> Markup:
    model, kind = str(base.get("model", "?")), str(seen.recipe.get("adapter.kind", "?"))
    found = within(seen.facts, "search", "best", "values").get("train.learning_rate")
    rate = told(plan.get("learning_rate") if found is None else found, 6).rstrip("0")
    return paragraph(
        Say(
            f"Task {seen.task}: {kind} on {shortened(model, 80)}; learning rate {rate}, at most"
            f" {told(plan.get('max_length'))} tokens a row.",
            f"작업 {seen.task}, 베이스 {shortened(model, 80)}, 어댑터 {kind}, 학습률 {rate}, 한 줄에 최대"
            f" {told(plan.get('max_length'))}토큰.",
        )
    )


def value_text(value: Any) -> str:
    """A value as a recipe has it, on one line, cut where it is long."""
    if isinstance(value, str):
        return shortened(value, LONGEST)
    text = yaml.dump(value, Dumper=RecipeDumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return shortened(text.removesuffix("...\n").strip(), LONGEST)


def _whole(recipe: Mapping[str, Any]) -> str:
    return "\n".join(f"{key}: {value_text(value)}" for key, value in recipe.items())


def use_section(seen: Seen) -> Markup:
    """How to talk to it, serve it, load it, and the command that does it all again."""
    told_by = str(seen.facts.get("command", ""))
    run = f"runs/{seen.name}"
    is_labeller = within(seen.facts, "base").get("kind") == "encoder"
    talk = f"python -m toolkit chat {run}\npython -m serve {run}"
    label = f"python -m toolkit evaluate {run} --data FILE"
    search = paragraph(
        Say(
            "A search that is repeated asks other trials where several worked at once.",
            "여러 프로세스가 함께 탐색했다면, 다시 돌릴 때 시도하는 값이 달라질 수 있습니다.",
        ),
        "note",
    )
    return section(
        "use",
        Say("Use it, and do it again", "쓰는 법과 다시 돌리는 법"),
        under(Say("On this machine", "이 컴퓨터에서"), code(label if is_labeller else talk)),
        under(Say("In Python", "파이썬에서"), code(_load(seen, is_labeller))),
        under(Say("The command that repeats it", "이 실행을 다시 하는 명령"), code(told_by) if told_by else EMPTY),
        search if seen.facts.get("search") else EMPTY,
        _sums(seen),
    )


def _load(seen: Seen, is_labeller: bool) -> str:
    run = f'"runs/{seen.name}"'
    if is_labeller:
        return f"from toolkit.loaded import load_labeller\nlabeller = load_labeller({run})"
    if (seen.path / "model").is_dir():
        model = f'"runs/{seen.name}/model"'
        return f"from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({model})"
    if within(seen.facts, "combination") and not (seen.path / "adapters" / "main").is_dir():
        return f"from toolkit.combine.speaker import open_speaker\nspeaker, loaded = open_speaker({run})"
    return f"from toolkit.loaded import load_run\nloaded = load_run({run})  # .model, .base.tokenizer, .renderer"


def _sums(seen: Seen) -> Markup:
    """What stands for the same data and base: hashes, and the versions at work."""
    inputs, around = within(seen.facts, "inputs"), within(seen.facts, "surroundings")
    files: list[tuple[Words, Words]] = [
        (shortened(name, 120), inline_code(str(digest)[:16])) for name, digest in within(inputs, "data").items()
    ]
    files.append((Say("the base", "베이스"), inline_code(str(inputs.get("base", ""))[:16])))
    versions = [(name, str(version)) for name, version in within(around, "versions").items()]
    head = (Say("file", "파일"), "SHA-256")
    return folded(
        Say("Files and versions", "파일과 버전"),
        joined(
            [
                table(Say("What it was made from", "만드는 데 쓴 파일"), head, files, texts=2),
                table(Say("Versions", "버전"), (Say("package", "패키지"), Say("version", "버전")), versions, texts=2),
            ]
        ),
    )
