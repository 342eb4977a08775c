"""`init FILE…`: look at files, ask what only the user knows, write a commented recipe. No file is ever overwritten."""

import argparse
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from toolkit.bases.catalog import BASES, find, nearest
from toolkit.bases.known import KnownBase
from toolkit.corpus.load import Sniffed, sniff
from toolkit.corpus.shapes import Format
from toolkit.corpus.tidy import language_of
from toolkit.errors import DataError, Problem, RecipeError
from toolkit.recipe.model import RESERVED_NAMES, Columns, Labels
from toolkit.recipe.read import check
from toolkit.recipe.tree import RecipeDumper, parse
from toolkit.recipe.world import folder_of

LANGUAGES = {"ko": "Korean / 한국어", "en": "English / 영어", "both": "both / 둘 다"}
DEVICES = {"cpu": "no GPU", "cuda": "an NVIDIA GPU", "mps": "a Mac"}
MOST_BASES = 12
HEAVY_ON_CPU = 600_000_000  # weights from which a base is slow to teach without a GPU


@dataclass(frozen=True)
class Look:
    """What the files hold: the one format they share, whether `auto` finds it, and the language of most of them."""

    format: Format
    is_sure: bool
    language: str


@dataclass(frozen=True)
class Answers:
    """What the user decided."""

    name: str
    files: tuple[str, ...]
    language: str
    base: str
    device: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `init`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="your talk: jsonl, jsonl.gz, csv, parquet or hub:NAME")
    parser.add_argument("--name", help="of the run (default: from the first file)")
    parser.add_argument("--language", choices=LANGUAGES, help="of the talk (default: asked, else guessed)")
    parser.add_argument("--base", help="catalogue name, hub id or folder (default: asked, else spoken-mini)")
    parser.add_argument("--device", choices=DEVICES, help="that will train (default: asked, else found)")
    parser.add_argument(
        "--user", metavar="COLUMN", help="column of what the user says, where the rows are no dialogues"
    )
    parser.add_argument("--assistant", metavar="COLUMN", help="column of the answer")
    parser.add_argument("--out", type=Path, help="the recipe to write (default: NAME.yaml); never overwritten")
    parser.add_argument("--yes", action="store_true", help="ask nothing; take the defaults")


def init(arguments: argparse.Namespace) -> int:
    """Write a recipe for some files. Raises DataError for files that are no talk, RecipeError where none is written."""
    look = look_at(arguments.files, arguments.user, arguments.assistant)
    answers = _ask_all(arguments, look)
    path = arguments.out or Path(f"{answers.name}.yaml")
    text = compose(answers, look, path)
    _, problems = _unknown_base(answers.base) or check(parse(text, str(path)), to_run=True)
    if problems:
        raise RecipeError(f"{path} (not written)", problems)
    write_new(path, text)
    sys.stdout.write(f"Wrote {path}. Next:\n  python -m toolkit check {path}\n  python -m toolkit.train {path}\n")
    return 0


def look_at(files: Sequence[str], user: str | None, assistant: str | None) -> Look:
    """Sniff every file. Raises DataError with every file that is no talk, or whose rows differ from the others'."""
    found: dict[str, Sniffed] = {}
    problems: list[Problem] = []
    for file in files:
        try:
            found[file] = sniff(file)
        except DataError as error:
            problems += error.problems
    named = Columns(user=user, assistant=assistant) if user and assistant else None
    if bool(user) != bool(assistant):
        problems.append(Problem("--user, --assistant", "go together. Name both columns"))
    formats = {file: named or one.format for file, one in found.items()}
    for file, form in formats.items():
        if form is None:
            columns = ", ".join(found[file].fields)
            says = f"no dialogue is seen in its columns ({columns}). Name two of them: --user COLUMN --assistant COLUMN"
            problems.append(Problem(file, says))
    is_sure = named is None and all(one.is_sure for one in found.values())
    kinds = {form for form in formats.values() if form is not None}
    if len(kinds) > 1 and not is_sure:
        says = "rows of different shapes, which one recipe cannot name. Write a recipe for each"
        problems.append(Problem(", ".join(formats), says))
    if problems:
        raise DataError(files[0] if len(files) == 1 else f"{len(files)} files", problems)
    shared = next(iter(kinds)) if len(kinds) == 1 else "auto"
    return Look(shared, is_sure, _language(list(found.values())))


def _language(found: Sequence[Sniffed]) -> str:
    seen = {str(one.row.get("lang") or language_of(" ".join(_texts(one.row)))) for one in found} & {"ko", "en"}
    return "both" if len(seen) == 2 else seen.pop() if seen else "en"


def _texts(value: object) -> Iterator[str]:
    """Every text inside a row's value, but for what names a speaker."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner) if key not in ("role", "from") else ()
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _unknown_base(base: str) -> tuple[None, list[Problem]] | None:
    """A word that is neither in the catalogue nor a folder nor owner/name, as the problem it is."""
    if find(base) or "/" in base or folder_of(base):
        return None
    guess = "".join(f". Did you mean '{name}'?" for name in nearest(base)[:1])
    return None, [Problem("base.model", f"'{base}' is no base of the catalogue, no hub id and no folder{guess}")]


def _ask_all(arguments: argparse.Namespace, look: Look) -> Answers:
    asks = sys.stdin.isatty() and not arguments.yes
    language = arguments.language or (
        _choose("Language of the talk", LANGUAGES, look.language) if asks else look.language
    )
    base = arguments.base or (_choose_base(language) if asks else "spoken-mini")
    device = find_device()
    device = arguments.device or (_choose("What will train it", DEVICES, device) if asks else device)
    name = arguments.name or name_from(arguments.files[0])
    return Answers(name, tuple(arguments.files), language, base, device)


def _choose(question: str, choices: dict[str, str], default: str) -> str:
    """One of the choices, asked until it is one; an empty line, or the end of the input, is the default."""
    sys.stdout.write("".join(f"  {key:<5} {says}\n" for key, says in choices.items()))
    while True:
        answer = _line(f"{question} [{default}]: ") or default
        if answer in choices:
            return answer
        sys.stdout.write(f"One of {', '.join(choices)}.\n")


def _choose_base(language: str) -> str:
    known = suited(language)
    sys.stdout.write("".join(f"  {one.name:<28} {describe(one)}\n" for one in known[:MOST_BASES]))
    sys.stdout.write("  … or any hub id (owner/name) or folder\n")
    return _line("Base [spoken-mini]: ") or "spoken-mini"


def _line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        sys.stdout.write("\n")
        return ""


def suited(language: str) -> list[KnownBase]:
    """The known bases that speak a language (for `both`: both), the smallest first; those of unread languages not."""
    wanted = {"ko", "en"} if language == "both" else {language}
    return sorted((one for one in BASES if wanted <= set(one.languages or ())), key=lambda one: one.parameters or 0)


def describe(base: KnownBase) -> str:
    """A base in half a line: its size, what it needs, and whether its licence lets it be sold."""
    size = f"{base.parameters / 1e6:,.0f} M weights" if base.parameters else "size not read"
    memory = f", LoRA about {base.lora_mb / 1024:.1f} GB" if base.lora_mb else ""
    return f"{size}{memory}, {base.licence or 'licence not read'}" + (
        ", NOT commercial" if base.commercial is False else ""
    )


def find_device() -> str:
    """The device that this machine seems to have; nothing heavy is loaded to find out."""
    if sys.platform == "darwin":
        return "mps"
    return "cuda" if shutil.which("nvidia-smi") else "cpu"


def name_from(file: str) -> str:
    """A run's name from a file's: `talk/my chat.ko.jsonl` gives my_chat."""
    stem = re.split(r"[/:\\]", file.rstrip("/"))[-1].split(".")[0]
    name = re.sub(r"[^\w-]+", "_", stem).strip("_-") or "mine"
    return f"{name}_talk" if name.lower() in RESERVED_NAMES else name[:60]


def compose(answers: Answers, look: Look, path: Path) -> str:
    """The text of the recipe, with comments in the language of the talk."""
    in_korean = answers.language == "ko"
    known = find(answers.base)
    notes = (_KOREAN if in_korean else _ENGLISH) | {"base": _base_note(known, answers.device, in_korean)}
    task = "classify" if isinstance(look.format, Labels) else "chat"
    form = look.format if isinstance(look.format, str) else _flow(_named(look.format))
    form = "auto" if look.is_sure else form
    seen = f"# {notes['seen'].format(look.format)}" if look.is_sure and look.format != "auto" else ""
    metrics = "[loss, accuracy, macro_f1, log_loss]" if task == "classify" else ""
    lines = [
        f"# python -m toolkit.train {path}",
        f"# {notes['head']}",
        f"name: {_flow(answers.name)}",
        f"task: {task}",
        f"base:\n  model: {_flow(answers.base)}{notes['base']}",
        *([f"  quantize: none                  # {notes['quantize']}"] if answers.device == "cuda" else []),
        "data:\n  train:",
        *(f"    - {_flow(file)}" for file in answers.files),
        f"  valid: 0.1                      # {notes['valid']}",
        f"  test: 0.1                       # {notes['test']}",
        f"  format: {form:<24}{seen}".rstrip(),
        f"  system: null                    # {notes['system']}",
        f"adapter:                          # {notes['adapter']}\n  kind: lora",
        f"  rank: 16                        # {notes['rank']}",
        "  alpha: 2x",
        f"train:\n  epochs: 3                       # {notes['epochs']}",
        f"  batch_size: 8                   # {notes['batch']}",
        f"  learning_rate: auto             # {notes['rate']}",
        f"  early_stop_patience: 2          # {notes['patience']}",
        *([f"evaluate: {{prompts: null, metrics: {metrics}}}"] if metrics else []),
    ]
    return "\n".join(lines) + "\n"


def _named(form: Columns | Labels) -> dict[str, str]:
    return {"kind": form.kind, **form.model_dump(exclude_defaults=True)}


def _flow(value: object) -> str:
    """A value as YAML on one line, quoted where it has to be."""
    text = yaml.dump(
        value, Dumper=RecipeDumper, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _base_note(known: KnownBase | None, device: str, in_korean: bool) -> str:
    notes = []
    if known and known.remote_code:
        notes.append("trust_remote_code: true 가 필요합니다" if in_korean else "it wants trust_remote_code: true")
    if known and known.commercial is False:
        notes.append("상업 이용 불가" if in_korean else "its licence forbids commercial use")
    if known and device == "cpu" and (known.parameters or 0) > HEAVY_ON_CPU:
        notes.append("CPU에서는 오래 걸립니다" if in_korean else "slow to teach on a CPU")
    return f"  # {'; '.join(notes)}" if notes else ""


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist yet. Raises RecipeError where it does or cannot be written; replaces nothing."""
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        says = "is there already and is left as it is. Choose another with --out or --name"
        raise RecipeError(str(path), [Problem("", says)]) from None
    except OSError as error:
        says = f"cannot be written ({error.strerror}). Choose another place with --out"
        raise RecipeError(str(path), [Problem("", says)]) from None


_ENGLISH = {
    "head": "Every key that is left out has its default; `python -m toolkit check` prints them all.",
    "seen": "seen: {}",
    "quantize": "nf4: the base in 4 bits (QLoRA), a quarter of the memory",
    "valid": "share held out while training; early stopping looks at it",
    "test": "share held out until the end",
    "system": "a system turn for conversations without one",
    "adapter": "or prefix, reft, embedding, full",
    "rank": "larger learns more and forgets more",
    "epochs": "passes over the talk",
    "batch": "conversations per step",
    "rate": "by adapter and base; a number overrules",
    "patience": "evaluations without progress before it stops",
}
_KOREAN = {
    "head": "쓰지 않은 항목은 기본값을 따릅니다. `python -m toolkit check`로 모두 볼 수 있어요.",
    "seen": "알아본 형식: {}",
    "quantize": "nf4: 모델을 4비트로 올려 메모리를 4분의 1만 씁니다(QLoRA)",
    "valid": "학습 중에 점검할 몫. 조기 종료가 이것을 봅니다",
    "test": "끝에 한 번만 보는 몫",
    "system": "시스템 말이 없는 대화 앞에 붙일 글",
    "adapter": "prefix, reft, embedding, full 도 됩니다",
    "rank": "클수록 많이 배우고 많이 잊습니다",
    "epochs": "데이터를 몇 번 도는지",
    "batch": "한 걸음에 보는 대화 수",
    "rate": "방식과 모델에 맞춰 정합니다. 숫자를 쓰면 그대로 씁니다",
    "patience": "나아지지 않은 점검이 이만큼 이어지면 멈춥니다",
}
