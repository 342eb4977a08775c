"""How fast the server answers over HTTP, against others that could, and what many adapters, a run that is loaded and
long talks cost.

python benchmarks/serve.py [--bases random-10m spoken-mini] [--rounds 5] [--clients 1 8 32] [--contestants …]
[--parts …] (it says how long before it begins: about ten minutes a base on 2 cores with everybody, random-135m about as
long for two rounds). Goes on where an earlier call stopped; every round measures everything once, so what a
stopped call leaves is whole. --plot draws docs/images/fifty_turns.svg from the talk. --tiny tries all of it in a minute
and keeps nothing, but for the picture, in the folder that --plot names. --llama-server BINARY --llama-models FOLDER let
llama.cpp's server take part (serve_llama.py makes the files).

64 prompt and 64 new tokens, greedy, every prompt another text, streamed; the clients are a process of their own
(serve_load.py). Contestants, interleaved in every round, those that are not measured stopped:
  base              our server, no adapter (always takes part)
  adapters          our server, 8 LoRA runs of rank 16 in turn
  modules[-adapters]  the same two with --forward modules: transformers' modules in place of our own forward pass
  transformers      transformers serve --continuous-batching, on the base (it has no adapters)
  peft-names        PEFT's adapter_names in a plain loop over one static batch, no HTTP
  llama[-adapters]  llama.cpp's server, on the base, and with 8 adapters in flight
Parts: speed (the above), and on our server alone
  beside  a client of the base with 7 others busy on 7 adapters, against all 8 on the base
  pause   4 clients that stream from the base while a run is loaded, and unloaded: gaps between their tokens, against
          the same streams without
  talk    50 short turns, the cost of each; and what some of them cost where the history has to be read anew
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import load, save, say, surroundings
from serve_parts import beside, pause, quantile, talk
from serve_plot import draw
from serve_report import report
from serve_rivals import CONTESTANTS, LLAMA, N_ADAPTERS, Rival, World, make_world, peft_names, prompts, rivals
from serve_world import ROOT

PARTS = ("speed", "beside", "pause", "talk")
BASES = ("random-10m", "spoken-mini", "random-135m")
PICTURE = ROOT / "docs" / "images"
MOST_TALKS = 3
# Tokens a second of a middling contestant, by clients: only to say beforehand how long it will take.
GUESSED = {
    "random-10m": {1: 110.0, 8: 450.0, 32: 750.0},
    "spoken-mini": {1: 200.0, 8: 800.0, 32: 1300.0},
    "random-135m": {1: 14.0, 8: 60.0, 32: 105.0},
}
START_S, CALL_S = 15.0, 0.6  # of a server, of a measurement beside what it measures


@dataclass(frozen=True)
class Sizes:
    """How much is asked. each: requests a client and round, by clients; n_watched: requests a client in `beside`;
    n_stream, after: tokens of the streams in `pause`, and after how many of them a run is loaded, and unloaded;
    n_turns, anew: turns of the talk, and those of them that are read anew as well.
    """

    n_prompt: int
    n_new: int
    each: dict[int, int]
    n_watched: int
    n_stream: int
    after: tuple[int, int]
    n_turns: int
    anew: tuple[int, ...]

    def tokens(self, n_clients: int) -> int:
        """How many are written in a measurement."""
        return n_clients * self.each.get(n_clients, 1) * self.n_new


SMALL = Sizes(64, 64, {1: 4, 8: 2, 32: 2}, 6, 160, (32, 96), 50, (1, 10, 20, 30, 40, 50))
LARGE = Sizes(64, 64, {1: 2, 8: 1, 32: 1}, 3, 160, (32, 96), 50, (1, 10, 20, 30, 40, 50))
TINY = Sizes(8, 8, {}, 1, 24, (4, 12), 4, (1, 4))


def sizes_of(name: str, is_tiny: bool) -> Sizes:
    """What is asked on a base: less on a slow one."""
    return TINY if is_tiny else LARGE if name == "random-135m" else SMALL


class Contest:
    """All contestants on one base."""

    def __init__(self, world: World, others: dict[str, Rival], peft: Any, sizes: Sizes) -> None:
        self.world, self.others, self.peft, self.sizes = world, others, peft, sizes
        self._seed = 0

    def texts(self, count: int, n_opening: int = 0) -> list[str]:
        """Texts that nobody was asked before, since the servers started; shorter by what a server adds."""
        self._seed += 1
        return prompts(self.world, count, self.sizes.n_prompt - n_opening, self._seed)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[Rival]:
        """Everybody else is stopped meanwhile."""
        self.stop()
        self.others[name].go_on()
        yield self.others[name]

    def stop(self) -> None:
        """Nobody runs."""
        for rival in self.others.values():
            rival.pause()

    def measured(
        self, rival: Rival, clients: list[list[dict[str, Any]]], path: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """What the clients saw."""
        job = json.dumps({"port": rival.port, "path": path or rival.path, "clients": clients, **more})
        words = [sys.executable, str(Path(__file__).with_name("serve_load.py"))]
        done = subprocess.run(words, input=job, capture_output=True, text=True, check=True, timeout=1800)
        return dict(json.loads(done.stdout))

    def speed(self, name: str, n_clients: int, n_new: int, n_each: int) -> dict[str, Any]:
        """One measurement of one contestant."""
        if name == "peft-names":
            return self._peft(n_clients, n_new)
        with self.alone(name) as rival:
            texts = iter(self.texts(n_clients * n_each, rival.n_opening))
            bodies = [[rival.body(next(texts), c, n_new) for _ in range(n_each)] for c in range(n_clients)]
            return summed(self.measured(rival, bodies))

    def _peft(self, n_rows: int, n_new: int) -> dict[str, Any]:
        self.stop()
        tokenizer = self.world.base.tokenizer
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.texts(n_rows)]
        self.peft.stdin.write(json.dumps({"ids": ids, "n_tokens": n_new}) + "\n")
        self.peft.stdin.flush()
        seen = json.loads(self.peft.stdout.readline())
        first = seen["first_s"]
        told = {"tokens_s": n_rows * n_new / seen["took_s"], "n": n_rows, "n_errors": 0, "tokens": [n_new]}
        return told | {"read": [len(ids[0])], "first_p50_s": first, "first_p95_s": first}


def summed(seen: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second, and the time until the first of them."""
    good = [one for one in seen["requests"] if "error" not in one]
    errors = [one["error"] for one in seen["requests"] if "error" in one]
    told: dict[str, Any] = {"n_errors": len(errors), **({"error": errors[0]} if errors else {})}
    if good:
        firsts = [one["first_s"] for one in good]
        told |= {"tokens_s": sum(one["tokens"] for one in good) / seen["wall_s"], "n": len(good)}
        told |= {"first_p50_s": statistics.median(firsts), "first_p95_s": quantile(firsts, 0.95)}
        told |= {key: sorted({one[key] for one in good if one[key]}) for key in ("tokens", "read")}
    return told


def contest(results: dict[str, Any], name: str, asked: argparse.Namespace, folder: Path) -> None:
    """All that is asked for on one base, round by round; results are kept after every measurement."""
    sizes, who = sizes_of(name, asked.tiny), taking_part(asked, name)
    cases = results["cases"]
    jobs = [f"{name} clients={n}" for n in asked.clients] if "speed" in asked.parts else []
    jobs += [f"{name} {part}" for part in asked.parts if part != "speed"]
    if all(n_done(cases.get(key), key, who) >= n_rounds(key, asked) for key in jobs):
        say(f"{name}: all of it was measured by earlier calls")
        return
    say(f"{name}: {', '.join(who)}; about {expected_s(name, sizes, who, asked) / 60:.0f} minutes")
    world, since = make_world(name, folder), time.monotonic()
    with rivals(world, who, (asked.llama_server, asked.llama_models)) as others, peft_names(world, who) as peft:
        one = Contest(world, others, peft, sizes)
        for rival in [*others, *(["peft-names"] if peft else [])]:  # the first request compiles, allocates, reads
            one.speed(rival, max(asked.clients), 4, 1)
        say(f"  started and warm after {time.monotonic() - since:.0f} s")
        for number in range(asked.rounds):
            since = time.monotonic()
            for key in jobs:
                case = cases.setdefault(key, {"rounds": []})
                if n_done(case, key, who) <= number < n_rounds(key, asked):
                    case["rounds"].append(measure(one, key.split(" ", 1)[1], who, number))
                    keep(results, asked)
            took = time.monotonic() - since
            left = (asked.rounds - number - 1) * took / 60
            say(f"  round {number + 1} of {asked.rounds}: {took:.0f} s; about {left:.0f} minutes to go on this base")
        for rival in others.values():
            rival.go_on()


def measure(one: Contest, what: str, who: Sequence[str], number: int) -> Any:
    """One round of one case."""
    if what.startswith("clients="):
        n_clients, shift = int(what.removeprefix("clients=")), number % len(who)
        order = [*who[shift:], *who[:shift]]
        n_new, n_each = one.sizes.n_new, one.sizes.each.get(n_clients, 1)
        return {name: one.speed(name, n_clients, n_new, n_each) for name in order}
    return {"beside": beside, "pause": pause, "talk": talk}[what](one, number)


def n_rounds(key: str, asked: argparse.Namespace) -> int:
    """How many are wanted: of a talk, which is long and steady, a few are enough."""
    return min(MOST_TALKS, asked.rounds) if key.endswith(" talk") else int(asked.rounds)


def n_done(case: dict[str, Any] | None, key: str, who: Sequence[str]) -> int:
    """How many rounds there are in which everybody took part who does now."""
    rounds = [] if case is None else case["rounds"]
    return len([one for one in rounds if set(who) <= one.keys()]) if "clients=" in key else len(rounds)


def taking_part(asked: argparse.Namespace, name: str) -> list[str]:
    """The contestants on this base."""
    if "speed" not in asked.parts:
        return ["base", "adapters"]  # one server
    has_llama = asked.llama_server is not None
    if has_llama and not set(LLAMA).isdisjoint(asked.contestants):
        files = [f"{name}.gguf", *(f"{name}-a{number}.gguf" for number in range(N_ADAPTERS))]
        lacking = [file for file in files if not (Path(asked.llama_models) / file).is_file()]
        if lacking:
            say(f"{name}: no {', '.join(lacking)} in {asked.llama_models}, so llama.cpp's server is left out")
        has_llama = not lacking
    return [one for one in CONTESTANTS if one in asked.contestants and (one not in LLAMA or has_llama)]


def expected_s(name: str, sizes: Sizes, who: Sequence[str], asked: argparse.Namespace) -> float:
    """About how long it will take, from what it took elsewhere."""
    speeds = GUESSED[name]
    speed = {n: speeds[min(speeds, key=lambda one: abs(one - n))] for n in {*asked.clients, 1, 8, 32}}
    times = {
        "speed": sum(len(who) * (sizes.tokens(n) / speed[n] + CALL_S) for n in asked.clients),
        "beside": 2 * (8 * sizes.n_watched * sizes.n_new / speed[8] + CALL_S),
        "pause": 2 * (4 * sizes.n_stream / speed[8] + CALL_S),
        "talk": sizes.n_turns * (20 / speed[1] + CALL_S / 2) + len(sizes.anew) * 60 / speed[1],
    }
    per_round = {part: min(MOST_TALKS, asked.rounds) if part == "talk" else asked.rounds for part in PARTS}
    warm = len(who) * (START_S + max(asked.clients) * 20 / speed[32])
    return float(warm + sum(per_round[part] * times[part] for part in asked.parts))


def keep(results: dict[str, Any], asked: argparse.Namespace) -> None:
    """Write what there is, unless it is only tried."""
    if not asked.tiny:
        save(__file__, results)


def read_words() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bases", nargs="+", choices=BASES, help="default: random-10m spoken-mini")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="default: all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--llama-server", metavar="BINARY")
    parser.add_argument("--llama-models", metavar="FOLDER")
    parser.add_argument("--plot", nargs="?", type=Path, const=PICTURE, metavar="FOLDER")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    if (asked.llama_server is None) != (asked.llama_models is None):
        parser.error("--llama-server and --llama-models go together")
    if asked.tiny:
        asked.rounds, asked.clients = 1, [1, 4]
        if asked.plot == PICTURE:
            parser.error("--tiny measures nothing that docs/ may show: name another folder, --plot FOLDER")
    asked.bases = asked.bases or (BASES[1:2] if asked.tiny else BASES[:2])
    asked.contestants = {"base", *asked.contestants}
    return asked


def main() -> None:
    """See the head of this file."""
    asked = read_words()
    results = {"cases": {}} if asked.tiny else load(__file__) or {"cases": {}}
    results["surroundings"] = surroundings(("torch", "transformers", "peft", "fastapi", "uvicorn"))
    say(str(results["surroundings"]))
    if asked.llama_server is None:
        say("llama.cpp's server is left out: no --llama-server")
    for name in asked.bases:
        with tempfile.TemporaryDirectory() as temporary:
            contest(results, name, asked, Path(temporary))
    report(results)
    keep(results, asked)
    if asked.plot is not None:
        draw(results, asked.plot, BASES[::-1])


if __name__ == "__main__":
    main()
