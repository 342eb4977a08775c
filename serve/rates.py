"""How often one owner may ask: `60/minute`, counted over a moving window, in this process alone."""

import math
import re
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from serve.refusal import Refusal

_RATE = re.compile(r"[1-9][0-9]{0,8}/(second|minute|hour|day)")


class Rates:
    """Counts requests by owner. `default` is the rate of owners that have none of their own; None: no limit."""

    def __init__(self, default: str | None = None) -> None:
        self._default = default
        self._counter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._items: dict[str, RateLimitItem] = {}

    def take(self, owner: str, rate: str | None = None, cost: int = 1) -> None:
        """Count `cost` requests. Raises Refusal: 429 rate_limited, with Retry-After, where they are too many."""
        rate = rate or self._default
        if rate is None:
            return
        item = self._items.setdefault(rate, parse(rate))
        if self._counter.hit(item, owner, cost=cost):
            return
        reset_s = self._counter.get_window_stats(item, owner).reset_time - time.time()
        wait_s = max(1, math.ceil(reset_s))
        says = f"More than {rate.replace('/', ' in a ')} for {owner}. Try again in {wait_s} s."
        raise Refusal(429, says, "rate_limited", headers={"retry-after": str(wait_s)})


def wrong_rate(rate: str) -> str | None:
    """Why this is no rate, or None where it is one."""
    return None if _RATE.fullmatch(rate) else f"{rate!r} is no rate. Write it as 5/second, 60/minute or 1000/hour."
