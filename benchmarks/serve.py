"""How fast the server answers over HTTP, against others that could, and what many adapters and long talks cost.

python benchmarks/serve.py [--rounds 5] [--bases random-10m spoken-mini] [--clients 1 8 32]     (about an hour on 2
cores; --bases random-135m for another one). Goes on where an earlier call stopped; --tiny tries all of it in a minute
and keeps nothing. --llama-server BINARY --llama-models FOLDER adds llama.cpp's server (NAME.gguf and NAME-a0.gguf …
NAME-a7.gguf in FOLDER, f32); without them it is left out.

64 prompt and 64 new tokens, greedy, every prompt another text, streamed; the clients are a process of their own
(serve_load.py). Contestants, interleaved in every round, those that are not measured stopped:
  base            our server, no adapter
  adapters        our server, 8 LoRA runs of rank 16 in turn
  modules[-adapters]  the same two with --forward modules, where --modules asks for them: transformers' modules in place
                  of our own forward pass
  transformers    transformers serve --continuous-batching, on the base (it has no adapters)
  peft-names      PEFT's adapter_names in a plain loop over one static batch, no HTTP
  llama[-adapters]  llama.cpp's server, on the base, and with 8 adapters in flight
Beside them, on our server: a client of the base with 7 others busy on 7 adapters, against all 8 on the base; and a talk
of 50 short turns, the cost of each.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import load, save, say, spread, surroundings
from serve_rivals import Rival, World, make_world, peft_names, prompts, rivals

PROMPT = NEW = 64
TURNS = 50
EACH = {1: 4, 4: 1, 8: 2, 32: 2}  # requests a client and round
BESIDE = 8  # clients, of which one is watched, and its requests
WATCHED = 6


def measured(rival: Rival, clients: list[list[dict[str, Any]]], path: str | None = None) -> dict[str, Any]:
    """What the clients saw."""
    job = json.dumps({"port": rival.port, "path": path or rival.path, "clients": clients})
    words = [sys.executable, str(Path(__file__).with_name("serve_load.py"))]
    done = subprocess.run(words, input=job, capture_output=True, text=True, check=True, timeout=1800)
    return dict(json.loads(done.stdout))


def summed(seen: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second, and the time until the first of them."""
    good = [one for one in seen["requests"] if "error" not in one]
    errors = [one["error"] for one in seen["requests"] if "error" in one]
    told: dict[str, Any] = {"n_errors": len(errors), **({"error": errors[0]} if errors else {})}
    if good:
        firsts = [one["first_s"] for one in good]
        told |= {"tokens_s": sum(one["tokens"] for one in good) / seen["wall_s"], "n": len(good)}
        told |= {"first_p50_s": statistics.median(firsts), "first_p95_s": quantile(firsts, 0.95)}
        told |= {"tokens": sorted({one["tokens"] for one in good})}
    return told


def quantile(values: list[float], share: float) -> float:
    """The value that this share of them is not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Contest:
    """All contestants on one base."""

    def __init__(self, world: World, others: dict[str, Rival], peft: Any, sizes: tuple[int, int]) -> None:
        self.world, self.others, self.peft = world, others, peft
        self.n_prompt, self.n_new = sizes
        self._seed = 0

    def texts(self, count: int) -> list[str]:
        """Texts that nobody was asked before."""
        self._seed += 1
        return prompts(self.world, count, self.n_prompt, self._seed)

    @contextlib.contextmanager
    def alone(self, name: str) -> Any:
        """Everybody else is stopped meanwhile."""
        for rival in self.others.values():
            rival.pause()
        self.others[name].go_on()
        yield self.others[name]

    def one(self, name: str, n_clients: int) -> dict[str, Any]:
        """One measurement."""
        if name == "peft-names":
            return self._peft(n_clients)
        with self.alone(name) as rival:
            n_each = EACH.get(n_clients, 2)
            texts = iter(self.texts(n_clients * n_each))
            bodies = [[rival.body(next(texts), c, self.n_new) for _ in range(n_each)] for c in range(n_clients)]
            return summed(measured(rival, bodies))

    def beside(self, with_adapters: bool) -> dict[str, Any]:
        """A client of the base, and 7 others on adapters, or on the base as well: what the first one waits."""
        with self.alone("base") as rival:
            texts = iter(self.texts(BESIDE * WATCHED))
            adapters = self.others["adapters"] if with_adapters else rival
            bodies = [
                [(adapters if c else rival).body(next(texts), c, self.n_new) for _ in range(WATCHED)]
                for c in range(BESIDE)
            ]
            own = [one for one in measured(rival, bodies)["requests"] if one["client"] == 0 and "error" not in one]
        return {"took_s": [one["took_s"] for one in own], "first_s": [one["first_s"] for one in own]}

    def talk(self, n_turns: int) -> list[dict[str, float]]:
        """A talk of many short turns: of each the seconds, and how many tokens were read and written."""
        said, turns = [], list[dict[str, float]]()
        with self.alone("base") as rival:
            for number, text in enumerate(prompts(self.world, n_turns, 8, 10_000)):
                said.append({"role": "user", "content": text})
                silent = {str(token): -100 for token in self.world.ends}
                body = {"model": "base", "messages": said, "max_tokens": 16, "temperature": 0, "stream": True}
                body |= {"stream_options": {"include_usage": True}, "logit_bias": silent}
                (seen,) = measured(rival, [[body]], "/v1/chat/completions")["requests"]
                if "error" in seen:
                    say(f"  turn {number + 1}: {seen['error']}")
                    break
                said.append({"role": "assistant", "content": seen["text"]})
                turns.append({"turn": number + 1, **{key: seen[key] for key in ("first_s", "took_s", "tokens")}})
        return turns

    def _peft(self, n_rows: int) -> dict[str, Any]:
        for rival in self.others.values():
            rival.pause()
        tokenizer = self.world.base.tokenizer
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.texts(n_rows)]
        self.peft.stdin.write(json.dumps({"ids": ids, "n_tokens": self.n_new}) + "\n")
        self.peft.stdin.flush()
        seen = json.loads(self.peft.stdout.readline())
        first = seen["first_s"]
        told = {"tokens_s": n_rows * self.n_new / seen["took_s"], "n": n_rows, "n_errors": 0, "tokens": [self.n_new]}
        return told | {"first_p50_s": first, "first_p95_s": first}


def contest(results: dict[str, Any], world: World, asked: argparse.Namespace) -> None:
    """All cases on one base; results are kept after every round."""
    sizes = (8, 8) if asked.tiny else (PROMPT, NEW)
    llama = (asked.llama_server, asked.llama_models) if has_llama(asked, world.name) else ()
    with rivals(world, llama, with_modules=asked.modules) as others, peft_names(world) as peft:
        one = Contest(world, others, peft, sizes)
        names = [*others, "peft-names"]
        for name in names:  # the first request compiles, allocates, reads
            one.one(name, max(asked.clients[0], 1 if asked.tiny else 8))
        for n_clients in asked.clients:
            case = results["cases"].setdefault(f"{world.name} clients={n_clients}", {"rounds": [], "n_new": sizes[1]})
            while len(case["rounds"]) < asked.rounds:
                shift = len(case["rounds"]) % len(names)
                case["rounds"].append({name: one.one(name, n_clients) for name in names[shift:] + names[:shift]})
                keep(results, asked)
        case = results["cases"].setdefault(f"{world.name} beside", {"rounds": []})
        while len(case["rounds"]) < asked.rounds:
            order = ("adapters", "base") if len(case["rounds"]) % 2 else ("base", "adapters")
            case["rounds"].append({who: one.beside(who == "adapters") for who in order})
            keep(results, asked)
        case = results["cases"].setdefault(f"{world.name} talk", {"rounds": []})
        while len(case["rounds"]) < min(3, asked.rounds):
            case["rounds"].append(one.talk(4 if asked.tiny else TURNS))
            keep(results, asked)
        for rival in others.values():
            rival.go_on()


def has_llama(asked: argparse.Namespace, name: str) -> bool:
    """Whether llama.cpp's server can take part on this base."""
    if asked.llama_server is None:
        return False
    if (Path(asked.llama_models) / f"{name}.gguf").is_file():
        return True
    say(f"{name}: no {name}.gguf in {asked.llama_models}, so llama.cpp's server is left out")
    return False


def keep(results: dict[str, Any], asked: argparse.Namespace) -> None:
    """Write what there is, unless it is only tried."""
    if not asked.tiny:
        save(__file__, results)


def report(results: dict[str, Any]) -> None:
    """Medians with spread, and ratios taken within rounds."""
    for key, case in sorted(results["cases"].items()):
        rounds = case["rounds"]
        if not rounds:
            continue
        say(key)
        if key.endswith(" talk"):
            turns = zip(*[[turn["took_s"] for turn in one] for one in rounds], strict=False)
            case["took_s"] = each = [statistics.median(values) for values in turns]
            shown = ", ".join(f"{each[place]:.3f}" for place in (0, 1, len(each) // 2, -1))
            say(f"    seconds of turn 1, 2, {len(each) // 2 + 1}, {len(each)}: {shown}")
        elif key.endswith(" beside"):
            p95 = {who: quantile([s for one in rounds for s in one[who]["took_s"]], 0.95) for who in rounds[0]}
            case["p95_s"] = p95 | {"ratio": p95["adapters"] / p95["base"]}
            shown = f"{p95['adapters']:.3f} s, of the base {p95['base']:.3f} s"
            say(f"    p95 of a base request beside 7 of adapters {shown}")
            say(f"    ratio {p95['adapters'] / p95['base']:.3f}")
        else:
            contestants(case, rounds)


def contestants(case: dict[str, Any], rounds: list[dict[str, Any]]) -> None:
    """Speed of each, as such and by our own base's."""
    case["median"] = {}
    for who in rounds[0]:
        whole = [one for one in rounds if "tokens_s" in one[who] and "tokens_s" in one["base"]]
        if not whole:
            say(f"    {who:<15} no answer: {rounds[0][who].get('error')}")
            continue
        speeds = [one[who]["tokens_s"] for one in whole]
        shares = [one[who]["tokens_s"] / one["base"]["tokens_s"] for one in whole]
        first = [statistics.median(one[who][f"first_p{p}_s"] for one in whole) for p in (50, 95)]
        wrong = sum(one[who]["n_errors"] for one in rounds)
        case["median"][who] = {"tokens_s": statistics.median(speeds), "of_base": statistics.median(shares)}
        case["median"][who] |= {"first_p50_s": first[0], "first_p95_s": first[1], "n_errors": wrong}
        say(f"    {who:<15} {spread(speeds)} tokens/s, {spread(shares)} of base")
        say(
            f"    {'':<15} first token p50 {first[0]:.3f} p95 {first[1]:.3f} s" + (f", {wrong} ERRORS" if wrong else "")
        )


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    bases = ["random-10m", "spoken-mini", "random-135m"]
    parser.add_argument("--bases", nargs="+", choices=bases, help="default: random-10m spoken-mini")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--llama-server", metavar="BINARY")
    parser.add_argument("--llama-models", metavar="FOLDER")
    parser.add_argument("--modules", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    if (asked.llama_server is None) != (asked.llama_models is None):
        parser.error("--llama-server and --llama-models go together")
    if asked.tiny:
        asked.rounds, asked.clients = 1, [1, 4]
    asked.bases = asked.bases or (["spoken-mini"] if asked.tiny else bases[:2])
    results = {"cases": {}} if asked.tiny else load(__file__) or {"cases": {}}
    results["surroundings"] = surroundings(("torch", "transformers", "peft", "fastapi", "uvicorn"))
    say(str(results["surroundings"]))
    if asked.llama_server is None:
        say("llama.cpp's server is left out: no --llama-server")
    for name in asked.bases:
        with tempfile.TemporaryDirectory() as temporary:
            contest(results, make_world(name, Path(temporary)), asked)
    report(results)
    keep(results, asked)


if __name__ == "__main__":
    main()
