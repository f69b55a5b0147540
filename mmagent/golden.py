"""Whether an answer is the one that was stored when a bundle was exported: what a gate asks of golden examples, whoever
asks them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of probabilities and values. Of bfloat16, which has three digits: labels still have to be the same.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.03}
_SAME = ("label", "labels", "text")


def difference(
    wanted: Mapping[str, Any], answer: Mapping[str, Any], tolerance: float = TOLERANCE["fp32"]
) -> tuple[str, float]:
    """In which words an answer (`Answer.to_dict`) differs from the stored one, if at all; and by how much at most a
    probability does."""
    for key in _SAME:
        if wanted.get(key) != answer.get(key):
            return f"{key} is {answer.get(key)!r:.80}, was {wanted.get(key)!r:.80}", 0.0
    if _bare(wanted.get("spans")) != _bare(answer.get("spans")):
        return "its spans are others", 0.0
    before, now = wanted.get("probabilities") or {}, answer.get("probabilities") or {}
    off = max((abs(before.get(key, 0.0) - now.get(key, 0.0)) for key in {*before, *now}), default=0.0)
    off = max(off, abs(float(wanted["confidence"]) - float(answer["confidence"])))
    value, was = answer.get("value"), wanted.get("value")
    if value is not None and was is not None and abs(value - was) > tolerance * max(1.0, abs(was)):
        return f"value is {value:g}, was {was:g}", off
    return (f"a probability is off by {off:.2g}" if off > tolerance else ""), off


def _bare(spans: Any) -> list[tuple[str, str]]:
    return [(each["text"], each["label"]) for each in spans or ()]
