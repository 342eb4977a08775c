"""What a run cost: time, tokens, memory, and energy by an assumption that is said."""

from datetime import datetime
from typing import Any

from markupsafe import Markup

from toolkit.report.markup import paragraph, section, table
from toolkit.report.seen import Seen
from toolkit.report.words import Say, Words, counted, number, shortened, span, told, within

WATTS_THREAD = 10.0  # a CPU thread at work, its share of the machine included
WATTS_GPU = 300.0


def cost_section(seen: Seen) -> Markup:
    """A table of everything that was counted, and how the energy was estimated."""
    rows = cost_rows(seen)
    head = (Say("what", "항목"), Say("how much", "값"))
    is_gpu = within(seen.facts, "surroundings").get("device") != "cpu"
    taken = (
        Say(f"{WATTS_GPU:.0f} W for the GPU", f"GPU 하나에 {WATTS_GPU:.0f} W")
        if is_gpu
        else Say(f"{WATTS_THREAD:.0f} W for each CPU thread at work", f"일하는 CPU 스레드마다 {WATTS_THREAD:.0f} W")
    )
    note = Say(
        f"The energy is an estimate, not a measurement: {taken.en} while training; loading and judging are not in it."
        " It may be off by a factor of two.",
        f"에너지는 잰 값이 아니라 추정입니다. 학습하는 동안 {taken.ko}로 쳤고, 불러오기와 평가는 넣지 않았습니다."
        " 실제와 두 배까지 차이 날 수 있습니다.",
    )
    shown = [[name, value] for name, value in rows]
    return section(
        "cost", Say("Cost", "비용"), table(Say("What it took", "들어간 자원"), head, shown), paragraph(note, "note")
    )


def cost_rows(seen: Seen) -> list[tuple[Words, Words]]:
    """(what, how much), those that are known."""
    fit, around, search = (within(seen.facts, key) for key in ("fit", "surroundings", "search"))
    rows: list[tuple[Words, Words]] = [(Say("training time", "학습 시간"), span(fit.get("seconds")))]
    seconds, tokens = number(fit.get("seconds")), number(fit.get("n_tokens"))
    if search:
        rows.append((Say("the whole search", "탐색 전체"), span(search.get("seconds"))))
    rows.append((Say("from first start to end", "처음 시작해서 끝날 때까지"), span(_wall(seen))))
    rows.append((Say("optimizer steps", "학습 단계"), counted(fit.get("steps"))))
    rows.append((Say("tokens", "토큰"), counted(tokens)))
    if seconds and tokens:
        rows.append((Say("tokens a second", "초당 토큰"), counted(tokens / seconds)))
    rows.append((Say("peak memory (MB)", "최대 메모리(MB)"), counted(seen.facts.get("memory_mb"))))
    energy = energy_wh(seen)
    if energy is not None:
        rows.append((Say("energy, estimated (Wh)", "에너지, 추정(Wh)"), f"{energy:.2g}"))
    device = shortened(around.get("device", "?"), 80)
    n = counted(around.get("threads"))
    rows.append(
        (
            Say("device", "장치"),
            Say(f"{device}, {n} thread{'s' * (n != '1')}", f"{device}, 스레드 {n}개") if device == "cpu" else device,
        )
    )
    return [row for row in rows if row[1] not in ("", Say("", ""))]


def energy_wh(seen: Seen) -> float | None:
    """Watt hours of training, by the assumption above; of a search all of it, of one of its workers."""
    around = within(seen.facts, "surroundings")
    seconds = number(within(seen.facts, "search").get("seconds")) or number(within(seen.facts, "fit").get("seconds"))
    if seconds is None:
        return None
    processes = number(around.get("processes")) or 1.0
    is_cpu = around.get("device") == "cpu"
    watts = WATTS_THREAD * (number(around.get("threads")) or 1.0) if is_cpu else WATTS_GPU
    return seconds * watts * processes / 3600


def _wall(seen: Seen) -> float | None:
    started, ended = within(seen.facts, "surroundings").get("started"), seen.facts.get("updated")
    begun, over = _when(started), _when(ended)
    return None if begun is None or over is None or over < begun else (over - begun).total_seconds()


def _when(stamp: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(stamp))
    except ValueError:
        return None


def per_second(seen: Seen) -> str:
    """Tokens a second of training."""
    fit = within(seen.facts, "fit")
    seconds, tokens = number(fit.get("seconds")), number(fit.get("n_tokens"))
    return told(round(tokens / seconds)) if seconds and tokens else ""
