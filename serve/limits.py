"""How much one key may ask: a bucket that fills by the minute, and a quota of the day.

Each replica lets its share of the minute's requests through; the day's are counted in the store, which all share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.errors import ApiError
from serve.keys import Key

RATE_HEADERS = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests")  # OpenAI's
_DAY_S = 86_400


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


class Limits:
    """
    Args:
        per_minute: requests of a key that says nothing itself; 0: as many as it likes.
        replicas: how many share a key's requests now.
        used_today: requests of a key since midnight UTC, this one counted (see `serve.store.Store.count`).
    """

    def __init__(
        self, per_minute: int, replicas: Callable[[], int], used_today: Callable[[str, str, float], int]
    ) -> None:
        self._per_minute, self._replicas, self._used_today = per_minute, replicas, used_today
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: Key) -> dict[str, str]:
        """Lets one request through; what its answer's headers say of the limit.

        Raises:
            ApiError: the limit is reached; says when to come again.
        """
        headers = self._minute(key)
        if key.per_day is not None:
            now = time.time()
            day = time.strftime("%Y-%m-%d", time.gmtime(now))
            left_s = _DAY_S - now % _DAY_S
            if self._used_today("requests", f"{key.id}.{day}", left_s + 3600) > key.per_day:
                message = f"the {key.per_day} requests of today are used up"
                raise _too_many(message, "quota_exceeded", math.ceil(left_s))
        return headers

    def _minute(self, key: Key) -> dict[str, str]:
        limit = key.per_minute or self._per_minute
        if not limit:
            return {}
        own = limit / max(1, self._replicas())
        now = time.monotonic()
        bucket = self._buckets.setdefault(key.id, _Bucket(own, now))
        bucket.tokens = min(max(own, 1.0), bucket.tokens + (now - bucket.at_s) * own / 60)
        bucket.at_s = now
        if bucket.tokens < 1:
            wait_s = math.ceil((1 - bucket.tokens) * 60 / own)
            raise _too_many(f"more than {limit} requests a minute", "rate_limit_exceeded", wait_s)
        bucket.tokens -= 1
        return dict(zip(RATE_HEADERS, (str(limit), str(int(bucket.tokens))), strict=True))


def _too_many(message: str, code: str, wait_s: int) -> ApiError:
    words = f"{message}; try again in {wait_s} s"
    return ApiError(429, words, code=code, headers={"Retry-After": str(wait_s)})
