"""Names of answers, requests and conversations: a prefix and a ULID, which sorts by time."""

from __future__ import annotations

import random
import time

# Seeded by the system once: asking it for each id takes a tenth of a millisecond. An id is a name, no secret.
_dice = random.Random()
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_id(prefix: str) -> str:
    """``ans_`` and a ULID (github.com/ulid/spec): 48 bits of milliseconds, 80 random ones, in Crockford's base 32."""
    number = int(time.time() * 1000) << 80 | _dice.getrandbits(80)
    return f"{prefix}_" + "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))
