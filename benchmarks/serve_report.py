"""What benchmarks/serve.py says at its end: medians with their range, and ratios taken within rounds."""

import statistics
from typing import Any

from machine import say, spread
from serve_parts import quantile

GROWTH_FROM = 2  # the first turn of a talk reads the template's own words


def report(results: dict[str, Any]) -> None:
    """Every case, and its figures into the results."""
    for key, case in sorted(results["cases"].items()):
        if case["rounds"]:
            say(key)
            {"beside": beside, "pause": pause, "talk": talk}.get(key.rsplit(" ", 1)[1], speed)(case)


def speed(case: dict[str, Any]) -> None:
    """Speed of each, as such and by our own base's."""
    rounds, case["median"] = case["rounds"], {}
    for who in dict.fromkeys(name for one in rounds for name in one):
        whole = [one for one in rounds if "tokens_s" in one.get(who, {}) and "tokens_s" in one["base"]]
        wrong = [one[who]["error"] for one in rounds if one.get(who, {}).get("n_errors")]
        if not whole:
            say(f"    {who:<17} no answer: {wrong[:1]}")
            continue
        speeds = [one[who]["tokens_s"] for one in whole]
        shares = [one[who]["tokens_s"] / one["base"]["tokens_s"] for one in whole]
        first = [statistics.median(one[who][f"first_p{p}_s"] for one in whole) for p in (50, 95)]
        times = statistics.median(1 / share for share in shares)
        case["median"][who] = {"tokens_s": statistics.median(speeds), "of_base": statistics.median(shares)}
        case["median"][who] |= {"base_is": times}
        case["median"][who] |= {"first_p50_s": first[0], "first_p95_s": first[1], "n_wrong": len(wrong)}
        says = "" if who == "base" else f", {spread(shares)} of base; base is {times:.3g} times it"
        say(f"    {who:<17} {spread(speeds)} tokens/s{says}")
        say(f"    {'':<17} first token p50 {first[0]:.3f} p95 {first[1]:.3f} s")
        for error in wrong[:1]:
            say(f"    {'':<17} ERRORS in {len(wrong)} rounds: {error}")
    for what in ("read", "tokens"):
        counts = {who: one[who][what] for one in rounds for who in one if one[who].get(what)}
        if len({tuple(found) for found in counts.values()}) > 1:
            say(f"    NOT ALIKE, tokens {'read' if what == 'read' else 'written'} by an answer: {counts}")


def beside(case: dict[str, Any]) -> None:
    """What a request of the base waits beside others."""
    rounds = case["rounds"]
    p95 = {who: quantile([s for one in rounds for s in one[who]["took_s"]], 0.95) for who in ("adapters", "base")}
    case["p95_s"] = p95 | {"ratio": p95["adapters"] / p95["base"]}
    n_each = sum(len(one["base"]["took_s"]) for one in rounds)
    say(f"    p95 of a base request beside 7 of adapters {p95['adapters']:.3f} s, of the base {p95['base']:.3f} s")
    say(f"    ratio {case['p95_s']['ratio']:.3f}, {n_each} requests each")
    wrong = [error for one in rounds for who in p95 for error in one[who]["wrong"]]
    if wrong:
        say(f"    {len(wrong)} ERRORS: {wrong[0]}")


def pause(case: dict[str, Any]) -> None:
    """Gaps between the tokens of four streams, without and with a run that comes and goes."""
    rounds, case["median"] = case["rounds"], {}
    for who, says in (
        ("quiet", "without any change"),
        ("load", "during the load"),
        ("unload", "during the unload"),
        ("changed", "in all of the streams with both"),
    ):
        found = [one[who] for one in rounds if who in one]
        if not found:
            say(f"    {says}: NEVER HAPPENED")
            continue
        each = {name: [1000 * one[f"{name}_s"] for one in found] for name in ("longest", "p95", "p50")}
        case["median"][who] = {f"{name}_ms": statistics.median(values) for name, values in each.items()}
        if "took_s" in found[0]:
            case["median"][who]["took_ms"] = statistics.median(1000 * one["took_s"] for one in found)
            says += f" ({case['median'][who]['took_ms']:.0f} ms from asked to answered)"
        say(f"    {says}: longest gap {spread(each['longest'])} ms")
        say(f"    {'':<8}p95 {spread(each['p95'])} ms, median {spread(each['p50'])} ms")
    longer = [one["load"]["longest_s"] - one["quiet"]["longest_s"] for one in rounds if "load" in one]
    if longer:
        say(f"    the longest gap is longer by {spread([1000 * one for one in longer])} ms where a run is loaded")
    if n_errors := sum(one["n_errors"] for one in rounds):
        say(f"    {n_errors} ERRORS")


def talk(case: dict[str, Any]) -> None:
    """What a turn costs, early and late, and where its history is read anew."""
    turns, anew = (medians(case["rounds"], part) for part in ("turns", "anew"))
    case["turns"], case["anew"] = turns, anew
    if len(turns) < GROWTH_FROM:
        say("    no talk")
        return
    for turn in (turns[GROWTH_FROM - 1], turns[len(turns) // 2], turns[-1]):
        say(
            f"    turn {turn['turn']:.0f}: {turn['took_s']:.3f} s, first token {turn['first_s']:.3f} s; history and"
            f" prompt {turn['read']:.0f} tokens, {turn['read'] - turn['reused']:.0f} of them new"
        )
    for turn in anew[1:][-2:]:
        say(
            f"    turn {turn['turn']:.0f} with its history read anew: {turn['took_s']:.3f} s, first token"
            f" {turn['first_s']:.3f} s; {turn['read'] - turn['reused']:.0f} tokens new"
        )
    late, early = turns[-1], turns[GROWTH_FROM - 1]
    slope = statistics.linear_regression([turn["read"] for turn in turns[1:]], [turn["took_s"] for turn in turns[1:]])
    case["growth"] = {"took": late["took_s"] / early["took_s"], "read": late["read"] / early["read"]}
    case["growth"]["ms_per_100_tokens"] = 1e5 * slope.slope
    say(
        f"    the last turn takes {case['growth']['took']:.2f} times turn {GROWTH_FROM}, its history is"
        f" {case['growth']['read']:.1f} times as long; {1e5 * slope.slope:.1f} ms for 100 tokens of history"
    )
    if len(anew) > 1:
        cold = statistics.linear_regression([turn["read"] for turn in anew], [turn["took_s"] for turn in anew])
        case["growth"]["anew_ms_per_100_tokens"] = 1e5 * cold.slope
        say(f"    read anew, {1e5 * cold.slope:.1f} ms for 100 tokens of history")


def medians(rounds: list[dict[str, Any]], part: str) -> list[dict[str, float]]:
    """The median of every number of every turn, with the range of the seconds; turns that every round has."""
    made = []
    for turns in zip(*[one[part] for one in rounds], strict=False):
        middle = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
        took = [turn["took_s"] for turn in turns]
        made.append(middle | {"least_s": min(took), "most_s": max(took)})
    return made
