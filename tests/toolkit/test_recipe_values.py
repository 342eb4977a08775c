"""Values, formats, names and overrides that are refused: what is accepted is said each time."""

from collections.abc import Callable

import pytest

HEAD = "name: mine\nbase: {model: spoken-mini}\ndata: {train: ['maltu:probes.jsonl']}\n"


Problems = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("train: {epochs: drei}", "train.epochs: must be a number, not 'drei'"),
        ("train: {epochs: '3'}", "train.epochs: must be a number, not '3'. Remove the quotes"),
        ("train: {epochs: 0}", "train.epochs: must be more than 0, not 0"),
        ("train: {epochs: .nan}", "train.epochs: must be a finite number"),
        ("train: {epochs: 1e999}", "train.epochs: must be a finite number"),
        ("train: {batch_size: 2.0}", "train.batch_size: must be a whole number, not 2.0. Write 2"),
        ("train: {batch_size: true}", "train.batch_size: must be a whole number, not true"),
        ("train: {batch_size: null}", "train.batch_size: must be a whole number, not null"),
        (
            "train: {micro_batch: atuo}",
            "train.micro_batch: must be auto or a whole number, not 'atuo'. Did you mean 'auto'?",
        ),
        ("train: {micro_batch: '4'}", "train.micro_batch: must be auto or a whole number, not '4'. Remove the quotes"),
        ("train: {learning_rate: fast}", "train.learning_rate: must be auto or a number, not 'fast'"),
        ("train: {packing: yes}", "train.packing: must be auto, true or false, not 'yes'. Write true"),
        ("train: {packing: off}", "train.packing: must be auto, true or false, not 'off'. Write false"),
        ("train: {packing: 1}", "train.packing: must be true or false, not 1. Write true"),
        ("adapter: {dora: no}", "adapter.dora: must be true or false, not 'no'. Write false"),
        ("train: {early_stop_patience: 0}", "train.early_stop_patience: must be at least 1, not 0"),
        ("train: {seed: 99999999999999}", "train.seed: must be less than"),
        ("train: 3", "train: must be a section with keys below it, not 3"),
        ("train: [epochs, 3]", "train: must be a section with keys below it, not a list"),
        ("track: wandb", "track: must be a list, as in [wandb], not 'wandb'"),
        ("track: null", "track: must be a list, not null. Write [] for none"),
        ("track: [wandbb]", "track.0: must be tensorboard, wandb or trackio, not 'wandbb'. Did you mean 'wandb'?"),
        ("adapter: {alpha: two}", "adapter.alpha: must be a number, or a multiple of the rank as in 2x, not 'two'"),
        ("adapter: {alpha: x}", "adapter.alpha: must be a number, or a multiple"),
        ("adapter: {alpha: -1}", "adapter.alpha: must be more than 0, not -1"),
        ("adapter: {targets: all}", "adapter.targets: 'all': here it is called all-linear"),
        ("adapter: {targets: q_proj}", "adapter.targets: must be all-linear or a list of layer names"),
        (
            "adapter: {init: pissa_niter_4}",
            "adapter.init: pissa_niter_4 does not come back as it was saved. Write pissa",
        ),
        ("adapter: {init: gaussian}", "adapter.init: must be default or pissa, not 'gaussian'"),
        ("adapter: {kind: reft, layers: [-1]}", "adapter.layers.0: must be at least 0, not -1"),
        ("adapter: {kind: reft, layers: some}", "adapter.layers: must be all or a list of layer numbers"),
        ("adapter: {kind: ia3, options: 3}", "adapter.options: must be a section with keys below it, not 3"),
        ("serve: {top_p: 90}", "serve.top_p: must be at most 1, not 90. It is a share: 0.1 is a tenth"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_accepted(problems: Problems, more: str, says: str) -> None:
    found = problems(more)
    assert len(found) == 1 and says in found[0], found
    assert found[0].startswith("line 4  ")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.valid=10", "must be at most 0.5, not 10. It is a share: 0.1 is a tenth"),
        ("data.valid=v.jsonl", "must be a list, as in [v.jsonl], not 'v.jsonl'"),
        ("data.format=chatml", "'chatml': here it is called messages"),
        ("data.format=jsno", "must be auto, messages, sharegpt, alpaca"),
        ("data.format={user: q, assistant: a}", "must be auto, messages, sharegpt, alpaca"),
        ("data.clean.near_duplicates=0.1", "must be at least 0.5, not 0.1"),
        ("data.clean.unicode=nfc", "must be NFC, NFKC or none, not 'nfc'. Did you mean 'NFC'?"),
        ("data.system=3", 'must be text, not 3. Write "3"'),
        ("base.quantize=4bit", "'4bit': here it is called nf4"),
        ("base.model=", "must be text, not null"),
        ("name=7", 'must be text, not 7. Write "7"'),
        ("train.epochs=", "must be a number, not null"),
        ("train.epochs=[", "A bracket or quote may not be closed"),
        ("train.epochs=!!python/name:os.system x", "the tag !!python/name:os.system is refused"),
        ("train.epcohs=3", "not a key of train. Did you mean 'epochs'?"),
        ("trian.epochs=3", "not a key of a recipe. Did you mean 'train'?"),
        ("lora_r=3", "here it is adapter.rank"),
        ("search.trials=3", "search.space: is missing. Write space: {train.learning_rate: {low: 1e-4"),
        ("experts.a={adapter: 3}", "must be a section with keys below it, not 3"),
        ("name.x=3", "must be text, not a section"),
        ("data.train.0=x.jsonl", "must be a list, not a section"),
    ],
)
def test_an_override_goes_through_the_same_checks(problems: Problems, override: str, says: str) -> None:
    found = problems("", override)
    assert len(found) == 1 and says in found[0], found
    assert found[0].startswith(f"override {override}")


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=3", ".epochs=3", "train. epochs=3", ""])
def test_an_override_without_key_or_value_is_told(problems: Problems, override: str) -> None:
    assert problems("", override) == [
        f"override {override}: must be key=value, as in train.epochs=1 or adapter.kind=prefix"
    ]


def test_a_value_inside_an_override_is_named(problems: Problems) -> None:
    found = problems("", "adapter={kind: prefix, tokens: 0, tokns: 3}")
    start = "override adapter={kind: prefix, tokens: 0, tokns: 3}  adapter."
    assert sorted(found) == [
        f"{start}tokens: must be at least 1, not 0",
        f"{start}tokns: not a key of a prefix adapter. Did you mean 'tokens'?",
    ]


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ("{kind: labels, text: t}", "data.format.label: is missing. Write label: …"),
        ("{kind: columns, user: q}", "data.format.assistant: is missing. Write assistant: …"),
        ("{kind: colums, user: q, assistant: a}", "data.format.kind: must be columns or labels, not 'colums'"),
        (
            "{kind: columns, user: q, asistant: a}",
            "data.format.asistant: not a key of a columns format. Did you mean 'assistant'?",
        ),
        (
            "{kind: columns, user: messages..content, assistant: a}",
            "data.format.user: 'messages..content' has an empty part",
        ),
        ("{kind: columns, user: q, assistant: q}", "data.format.assistant: names the column of user again"),
        ("{kind: labels, text: t, label: l, template: 'x'}", "data.format.template: must hold {text} once"),
    ],
)
def test_a_wrong_format_gives_one_complaint(problems: Problems, form: str, says: str) -> None:
    task = "classify" if "labels" in form else "chat"
    found = problems(
        head=HEAD.replace("['maltu:probes.jsonl']", f"['maltu:probes.jsonl'], format: {form}") + f"task: {task}\n"
    )
    assert len(found) == 1 and says in found[0], found


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("base", "'base' is reserved"),
        ("AUTO", "'AUTO' is reserved"),
        ("Con", "'Con' names a device on Windows"),
        ("lpt1.old", "'lpt1.old' names a device on Windows"),
        ("a/b", "it cannot hold /"),
        ("'mix:a=1,b'", "it cannot hold , : ="),
        ("'a\\b'", "it cannot hold \\"),
        ('"a\\nb"', "it cannot hold \\n"),
        ("..", "cannot be a folder's name"),
        (".old", "cannot be a folder's name"),
        ("' a '", "cannot be a folder's name"),
        ("'-rf'", "cannot be a folder's name"),
        ("''", "is empty. Write something"),
        ("말" * 70, "is 210 bytes long; a folder's name holds at most 200"),
        ("null", "must be text, not null"),
    ],
)
def test_a_name_that_cannot_be_a_run_is_refused(problems: Problems, name: str, says: str) -> None:
    found = problems(head=HEAD.replace("name: mine", f"name: {name}"))
    assert len(found) == 1 and says in found[0] and found[0].startswith("line 1  name: "), found
