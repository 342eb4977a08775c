"""Runs as a vLLM server takes them: plain LoRA adapters on one base, handed over as folders.

Only tokenizers and templates are opened here; the weights are vLLM's to read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from serve.engines.changing import has_effect
from serve.engines.contract import Served
from serve.engines.models import adapter_hash
from serve.names import BASE, refuse_name
from serve.runs import stands_alone
from toolkit.adapters import files
from toolkit.adapters.kinds import kind_in_folder
from toolkit.bases.files import hash_files, weight_files
from toolkit.bases.load import LoadedTokenizer, load_tokenizer
from toolkit.bundle import RUN_FILE, Run
from toolkit.combine.speaker import MAIN, spec_of
from toolkit.corpus.render import Renderer
from toolkit.disk import hash_file, hash_text
from toolkit.errors import AdapterError, BaseError, InputError, Problem, RunError
from toolkit.loaded import base_of, is_labeller, rendering_of
from toolkit.stack.adapter import Adapter

_WITHOUT = "Serve it without --engine vllm."


@dataclass(frozen=True)
class Handed:
    """A name that answers through vLLM.

    lora: what vLLM calls its adapter, which lies in `folder`; None for the base alone. The name holds a hash of
    weights and config, so that an older version of a run keeps a name of its own. ends: ids that end an answer.
    n_vocabulary: token ids lie below it.
    """

    served: Served
    renderer: Renderer
    tokenizer: Any
    ends: frozenset[int]
    n_vocabulary: int
    lora: str | None = None
    folder: Path | None = None


def describe_runs(runs: Sequence[Run]) -> dict[str, Handed]:
    """The base, and every run's adapters, under the names that they answer to.

    Raises: InputError with every run that vLLM cannot take and why; BaseError where the base's tokenizer cannot be
    read.
    """
    problems = [Problem(run.name, f"{why} {_WITHOUT}") for run in runs if (why := _unfit(run))]
    if problems:
        raise InputError("--engine vllm", problems)
    first = runs[0]
    tokenizer = load_tokenizer(base_of(first, first.finished("base")))
    made = {BASE: _handed(BASE, first, tokenizer, None)}
    for run in runs:
        made |= run_on(made[BASE], run)
    return made


def run_on(base: Handed, run: Run) -> dict[str, Handed]:
    """A run's names, on a base that is described already. Raises RunError for one that vLLM cannot take."""
    facts = run.finished("base")
    wrong = refuse_name(run.name) or _unfit(run)
    if wrong:
        raise RunError(f"{run.name}: {wrong} {_WITHOUT}")
    if facts["base"]["hash"] != base.served.base_hash:
        raise RunError(
            f"{run.name} stands on another base ({facts['base']['model']}, {facts['base']['hash'][:12]}) than this "
            f"server ({base.served.base}, {base.served.base_hash[:12]}). Serve it by itself."
        )
    made = {}
    for adapter in run.adapters():
        name = run.name if adapter == MAIN else f"{run.name}/{adapter}"
        made[name] = _handed(name, run, base, run.adapter(adapter))
    return made


def refuse_other_base(root: str, base: Handed) -> str | None:
    """Why the model that a vLLM server has is not the base of the runs, or None. root: where vLLM says it comes from.

    A folder of this machine is compared by its files, anything else by the last part of its name.
    """
    served, folder = base.served, Path(root)
    told = f"the vLLM server has {root}, and the runs stand on {served.base}"
    if folder.is_dir():
        try:
            found = hash_files(folder, weight_files(folder, root))
        except BaseError as error:
            return f"{told}. {error}"
        return None if found == served.base_hash else f"{told}: its files differ. Start vLLM on that base."
    if folder.name.lower() == Path(served.base).name.lower():
        return None
    return f"{told}. Start vLLM on that base."


def _handed(name: str, run: Run, on: LoadedTokenizer | Handed, folder: Path | None) -> Handed:
    facts = run.finished("base")
    template, sampling = rendering_of(run)
    renderer = Renderer(on.tokenizer, template)
    weights_hash = facts["base"]["hash"] if folder is None else adapter_hash(folder)
    if isinstance(on, Handed):
        context, n_vocabulary = on.served.context, on.n_vocabulary
    else:
        context, n_vocabulary = on.context, _n_vocabulary(on.config, on.tokenizer)
    served = Served(
        name=name,
        adapter=None if folder is None else name,
        base=facts["base"]["model"],
        base_hash=facts["base"]["hash"],
        weights_hash=weights_hash,
        context=context,
        task="chat" if folder is None else str(facts.get("task", "chat")),
        defaults=sampling,
        created=int((run.path / RUN_FILE).stat().st_mtime),
    )
    ends = frozenset(renderer.stop_ids)
    if folder is None:
        return Handed(served, renderer, on.tokenizer, ends, n_vocabulary)
    version = hash_text(weights_hash + hash_file(folder / files.CONFIG))[:12]
    return Handed(served, renderer, on.tokenizer, ends, n_vocabulary, f"maltu-{name}-{version}", folder.resolve())


def _n_vocabulary(config: Mapping[str, Any], tokenizer: Any) -> int:
    """As the base's config tells it, where it does."""
    of_text = config.get("text_config") or config
    return int(of_text.get("vocab_size") or len(tokenizer))


def _unfit(run: Run) -> str | None:
    """Why vLLM cannot take a run."""
    facts = run.finished("base")
    if is_labeller(facts):
        return "its base is an encoder: it labels texts, and cannot talk."
    if stands_alone(run):
        return "every weight of it was trained (full), and vLLM takes LoRA adapters."
    try:
        spec = spec_of(run, facts)
        if spec is not None and MAIN not in run.adapters():
            return f"its adapters answer together ({spec.kind}), and a vLLM server answers with one at a time."
        odd = [why for name in run.adapters() if (why := _odd(run.adapter(name), name))]
        for name in () if odd else run.adapters():
            _tensors(run.adapter(name), facts["base"]["hash"])  # vLLM would not say that they are no numbers
    except (AdapterError, RunError) as error:
        return str(error)
    return " ".join(odd) if odd else None if run.adapters() else "it has no adapter."


def refuse_idle(run: Run) -> str | None:
    """Why a run would answer as its base does, or None. Raises AdapterError for a damaged one."""
    idle = []
    for name in run.adapters():
        folder = run.adapter(name)
        if not has_effect(Adapter("lora", _tensors(folder, ""), files.read_config(folder))):
            idle.append(run.name if name == MAIN else f"{run.name}/{name}")
    return f"{', '.join(idle)} changes nothing: its weights are as they began. Train it longer." if idle else None


def _tensors(folder: Path, base_hash: str) -> dict[str, Tensor]:
    return files.read_tensors(folder, files.PEFT_TENSORS, files.Origin("", base_hash))


def _odd(folder: Path, name: str) -> str | None:
    kind = kind_in_folder(folder).name
    if kind != "lora":
        return f"{name} is an adapter of kind {kind}, and vLLM takes LoRA alone."
    config = files.read_config(folder)
    special = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("bias", "none") != "none":
        special.append("bias")
    return f"{name} is a LoRA adapter with {', '.join(special)}, which vLLM does not take." if special else None
