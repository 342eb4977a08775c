"""What benchmarks/serve.py measures on our own server alone: a base request beside others, the pause that a load costs,
a talk of many turns.
"""

import re
import statistics
import urllib.request
from collections.abc import Sequence
from typing import Any

from machine import say
from serve_rivals import LATE, Rival, prompts

N_BESIDE = 8  # clients, of which one is watched
N_STREAMS = 4
TURN_PROMPT, TURN_NEW = 8, 16  # tokens of what is said and of what is answered
CHAT = "/v1/chat/completions"


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of them is not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def beside(one: Any, number: int) -> dict[str, Any]:
    """A client of the base, and 7 others on adapters, or on the base as well: what the first one waits."""
    order = ("adapters", "base") if number % 2 else ("base", "adapters")
    return {who: _beside(one, who == "adapters") for who in order}


def _beside(one: Any, with_adapters: bool) -> dict[str, Any]:
    with one.alone("base") as rival:
        texts = iter(one.texts(N_BESIDE * one.sizes.n_watched))
        busy = one.others["adapters"] if with_adapters else rival
        bodies = [
            [(busy if c else rival).body(next(texts), c, one.sizes.n_new) for _ in range(one.sizes.n_watched)]
            for c in range(N_BESIDE)
        ]
        requests = one.measured(rival, bodies)["requests"]
    own = [seen for seen in requests if seen["client"] == 0 and "error" not in seen]
    wrong = [seen["error"] for seen in requests if "error" in seen]
    return {"took_s": [seen["took_s"] for seen in own], "first_s": [seen["first_s"] for seen in own], "wrong": wrong}


def pause(one: Any, number: int) -> dict[str, Any]:
    """The same four streams without and with a run that is loaded in the middle, and unloaded later."""
    load, unload = one.sizes.after
    with one.alone("base") as rival:
        texts = one.texts(N_STREAMS)
        bodies = [[rival.body(text, c, one.sizes.n_stream)] for c, text in enumerate(texts)]
        change = {"body": {"run": LATE}, "headers": one.world.admin}
        changes = [
            change | {"path": "/admin/load", "after": load},
            change | {"path": "/admin/unload", "after": unload},
        ]
        seen = {
            is_quiet: one.measured(rival, bodies, changes=[] if is_quiet else changes)
            for is_quiet in ((False, True) if number % 2 else (True, False))
        }
    told = {"quiet": _gaps(seen[True], load), "changed": _gaps(seen[False], load)}
    for made in seen[False]["changes"]:
        verb = made["path"].rsplit("/", 1)[1]
        told[verb] = _gaps(seen[False], 1, made) | {"took_s": made["ended_s"] - made["began_s"]}
        if "error" in made:
            say(f"  {verb}: {made['status']} {made['error']}")
    return told | {"n_errors": sum("error" in request for part in seen.values() for request in part["requests"])}


def _gaps(seen: dict[str, Any], first: int, during: dict[str, Any] | None = None) -> dict[str, Any]:
    """Gaps between the pieces of the streams, from a piece on; `during`: those that lie in or over a change's time."""
    gaps = []
    for request in seen["requests"]:
        at = request["at_s"]
        for before, after in zip(at[first - 1 :], at[first:], strict=False):
            if during is None or (after > during["began_s"] and before < during["ended_s"]):
                gaps.append(after - before)
    gaps = gaps or [0.0]
    return {"longest_s": max(gaps), "p95_s": quantile(gaps, 0.95), "p50_s": statistics.median(gaps), "n": len(gaps)}


def talk(one: Any, number: int) -> dict[str, Any]:
    """A talk of many short turns, of each the seconds and how many tokens were read, reused and written; and of some of
    them the same where nothing of the history is known: its first words are others, as many.
    """
    n_turns = min(one.sizes.n_turns, one.world.base.model.config.max_position_embeddings // 32)
    texts = prompts(one.world, n_turns, TURN_PROMPT, 10_000 + number)
    silent = {str(token): -100 for token in one.world.ends}
    body = {"model": "base", "max_tokens": TURN_NEW, "temperature": 0, "stream": True, "logit_bias": silent}
    body |= {"stream_options": {"include_usage": True}}
    said, turns, anew = list[dict[str, str]](), list[dict[str, float]](), list[dict[str, float]]()
    with one.alone("base") as rival:
        for turn, text in enumerate(texts, 1):
            said.append({"role": "user", "content": text})
            seen = _turn(one, rival, turn, body | {"messages": said})
            if seen is None:
                break
            turns.append({key: value for key, value in seen.items() if key != "text"})
            said.append({"role": "assistant", "content": seen["text"]})
        for turn in (turn for turn in one.sizes.anew if turn <= len(turns)):
            (other,) = prompts(one.world, 1, TURN_PROMPT, 20_000 + 100 * number + turn)
            messages = [{"role": "user", "content": other}, *said[1 : 2 * turn - 1]]
            seen = _turn(one, rival, turn, body | {"messages": messages})
            if seen is not None:
                anew.append({key: value for key, value in seen.items() if key != "text"})
    return {"turns": turns, "anew": anew}


def _turn(one: Any, rival: Rival, turn: int, body: dict[str, Any]) -> dict[str, Any] | None:
    before = _reused(one, rival)
    (seen,) = one.measured(rival, [[body]], CHAT)["requests"]
    if "error" in seen:
        say(f"  turn {turn}: {seen['error']}")
        return None
    kept = {key: seen[key] for key in ("first_s", "took_s", "tokens", "read", "text")}
    return {"turn": turn, "reused": _reused(one, rival) - before} | kept


def _reused(one: Any, rival: Rival) -> int:
    """Prompt tokens that the server found in its cache since it started."""
    ask = urllib.request.Request(f"http://127.0.0.1:{rival.port}/metrics", headers=one.world.admin)
    with urllib.request.urlopen(ask, timeout=10) as answer:
        found = re.search(r"^maltu_reused_tokens_total (\S+)$", answer.read().decode(), re.MULTILINE)
    if found is None:
        raise SystemExit("the server's /metrics do not say how many tokens were reused")
    return int(float(found[1]))
