"""Two languages at once: every sentence of a page in English and in Korean, and numbers as either writes them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

# What a browser would not show, or would let reorder the text around it, in signs that can be seen.
INVISIBLE = {0x200B, 0x2060, 0xFEFF, 0x00AD, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


@dataclass(frozen=True)
class Say:
    """The same in English and Korean. In HTML both stand there, each marked with its language; neither is HTML."""

    en: str
    ko: str

    def __html__(self) -> Markup:
        """Escaped; one text where both are alike."""
        if self.en == self.ko:
            return escape(self.en)
        return Markup('<span class="t" lang="en">{}</span><span class="t" lang="ko">{}</span>').format(self.en, self.ko)

    def __add__(self, other: "Say | str") -> "Say":
        """One after the other."""
        more = same(other)
        return Say(self.en + more.en, self.ko + more.ko)


Words = Say | str | Markup


def same(text: Say | str) -> Say:
    """A text that reads alike in both: a name, a number."""
    return text if isinstance(text, Say) else Say(text, text)


def visible(page: str) -> str:
    """A page whose control signs, lone surrogates and signs that turn the direction of reading can be seen."""
    table: dict[int, str] = {sign: f"⟨U+{sign:04X}⟩" for sign in INVISIBLE}
    table |= {sign: chr(0x2400 + sign) for sign in range(0x20) if chr(sign) not in "\n\t"} | {0x7F: "␡"}
    table |= {sign: f"⟨U+{sign:04X}⟩" for sign in range(0x80, 0xA0)}
    return page.translate(table).encode("utf-8", "replace").decode("utf-8")


def shortened(text: Any, most: int) -> str:
    """At most so many signs of a text, and how many more there were."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[:most]}… (+{len(whole) - most:,})"


def number(value: Any) -> float | None:
    """A finite number, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def told(value: Any, digits: int = 3) -> str:
    """A number with its digits, thousands apart; nothing for none."""
    found = number(value)
    if found is None:
        return ""
    return f"{found:,.0f}" if abs(found) >= 1000 or found == int(found) else f"{found:.{digits}f}"


def counted(value: Any) -> str:
    """A whole number, thousands apart; nothing for none."""
    found = number(value)
    return "" if found is None else f"{found:,.0f}"


def percent(share: Any, digits: int = 0) -> str:
    """A share as per cent; nothing for none."""
    found = number(share)
    return "" if found is None else f"{100 * found:.{digits}f} %"


def span(seconds: Any) -> Say:
    """A time in the unit that people would take."""
    found = number(seconds)
    if found is None:
        return Say("", "")
    if found < 120:
        digits = f"{found:.0f}" if found >= 10 else f"{found:.1f}"
        return Say(f"{digits} s", f"{digits}초")
    return (
        Say(f"{found / 60:.0f} min", f"{found / 60:.0f}분")
        if found < 7200
        else Say(f"{found / 3600:.1f} h", f"{found / 3600:.1f}시간")
    )


def listed(words: Sequence[Say | str]) -> Say:
    """With commas between them."""
    both = [same(word) for word in words]
    return Say(", ".join(word.en for word in both), ", ".join(word.ko for word in both))


def within(facts: Any, *keys: str) -> Mapping[str, Any]:
    """The map that lies there in run.json; an empty one where there is none."""
    for key in keys:
        facts = facts.get(key) if isinstance(facts, Mapping) else None
    return facts if isinstance(facts, Mapping) else {}


def within_list(facts: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The maps of the list that lies there in run.json."""
    found = within(facts, *keys[:-1]).get(keys[-1])
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list | tuple) else []


METRICS: Mapping[str, Say] = {
    "loss": Say("loss (nats a token)", "손실(토큰당 nat)"),
    "content loss": Say("content loss", "내용 손실"),
    "bits per byte": Say("bits per byte", "1바이트당 비트"),
    "chrf": Say("chrF (reference)", "chrF(기준 대답)"),
    "distinct 2": Say("different word pairs", "서로 다른 낱말 쌍"),
    "repetition": Say("repeated 4-grams", "되풀이된 4-gram"),
    "mean tokens": Say("tokens an answer", "대답의 토큰 수"),
    "ended": Say("answers that end", "스스로 끝낸 대답"),
    "sentences banmal": Say("sentences in banmal", "반말 문장"),
    "answers banmal": Say("answers in banmal", "반말 대답"),
    "sentences haeyo": Say("sentences in haeyo", "해요체 문장"),
    "answers haeyo": Say("answers in haeyo", "해요체 대답"),
    "sentences hapsyo": Say("sentences in hapsyo", "합쇼체 문장"),
    "answers hapsyo": Say("answers in hapsyo", "합쇼체 대답"),
    "spoken sentences": Say("spoken sentences", "입말 문장"),
    "spoken bits per byte": Say("bits per byte of speech", "입말 1바이트당 비트"),
    "written bits per byte": Say("bits per byte of writing", "글말 1바이트당 비트"),
    "accuracy": Say("accuracy", "정확도"),
    "macro f1": Say("macro F1", "매크로 F1"),
    "log loss": Say("log loss", "로그 손실"),
    "calibration error": Say("calibration error", "보정 오차"),
}
LANGS: Mapping[str, Say] = {"": Say("all", "전체"), "ko": Say("Korean", "한국어"), "en": Say("English", "영어")}
REASONS: Mapping[str, Say] = {
    "empty": Say("empty", "비어 있음"),
    "one_sided": Say("no question with an answer", "질문이나 대답이 빠짐"),
    "too_few_turns": Say("too few turns", "턴이 너무 적음"),
    "exact_duplicate": Say("exact duplicate", "똑같은 대화"),
    "near_duplicate": Say("near duplicate", "거의 같은 대화"),
    "too_long": Say("too long", "너무 긺"),
    "old_turns": Say("oldest turns cut", "오래된 턴을 잘라 냄"),
}


def metric_name(metric: str) -> Say:
    """A metric as both languages call it."""
    return METRICS.get(metric) or same(metric)


def lang_name(lang: str) -> Say:
    """A language as both languages call it."""
    return LANGS.get(lang) or same(lang)


def reason_name(reason: str) -> Say:
    """Why a conversation was dropped, in words."""
    return REASONS.get(reason) or same(str(reason).replace("_", " "))
