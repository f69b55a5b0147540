"""The gate between training and serving: a bundle's golden examples are asked again through the whole serving path,
and must get the answers that were stored when it was exported."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmagent import golden as golden_answers
from mmagent import written
from mmagent.record import Record, segments
from mmagent.rows import parse
from mmagent.targets import kind
from mmagent.written import Wording
from serve.questions import PredictRequest


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the golden examples."""

    asked: int
    differences: tuple[str, ...]  # one line for each example that differs
    worst: float  # the largest difference of a probability

    @property
    def passed(self) -> bool:
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "golden_asked": self.asked,
            "golden_different": len(self.differences),
            "worst_probability_difference": self.worst,
            "differences": list(self.differences[:5]),
        }


async def judge(
    golden: Sequence[Mapping[str, Any]],
    ask: Callable[[PredictRequest], Awaitable[Mapping[str, Any]]],
    tolerance: float = golden_answers.TOLERANCE["fp32"],
) -> Verdict:
    """
    Args:
        golden: of a bundle.
        ask: gives the extension of the answer to a request.
        tolerance: by how much a probability may differ.
    """
    differences, worst = [], 0.0
    for number, row in enumerate(golden):
        record = parse(row["record"])
        try:
            answer = await ask(as_request(record))
        except Exception as error:  # noqa: BLE001  whatever it raises, the example has no answer
            differences.append(f"example {number}: no answer: {str(error)[:200]}")
            continue
        found, off = golden_answers.difference(row["answer"], answer, tolerance)
        worst = max(worst, off)
        if found:
            differences.append(f"example {number} ({record.modalities}): {found}")
    return Verdict(len(golden), tuple(differences), round(worst, 7))


def as_request(record: Record) -> PredictRequest:
    """The request that a client would send for a record."""
    images, audios = iter(record.images), iter(record.audios)
    messages, context, wordings = [], None, {}
    for message in record.messages:
        content: list[dict[str, Any]] = []
        wording = Wording()
        for what, words in written.parts(message):
            if what == "text":
                content.append({"type": "text", "text": words})
                wording.add_words(words)
            elif what == "image":
                url = f"data:image/png;base64,{_base64(next(images).read())}"
                content.append({"type": "image_url", "image_url": {"url": url}})
                wording.add_mark("image")
            else:
                sound = {"data": _base64(next(audios).read()), "format": "wav"}  # what it is, its header says
                content.append({"type": "input_audio", "input_audio": sound})
                wording.add_mark("audio")
        wordings[message.role] = wording
        if message.role == "context":
            context = wording.words
            continue
        said: dict[str, Any] = {"role": message.role, "content": content, "tool_call_id": message.tool_call_id}
        if message.tool_calls:
            calls = [
                {"id": c["id"], "function": {"name": c["name"], "arguments": c["arguments"]}}
                for c in message.tool_calls
            ]
            said["tool_calls"] = calls
        messages.append(said)
    more: dict[str, Any] = {}
    if record.candidates:
        more["candidates"] = [_candidate(each) for each in record.candidates]
    if kind(record.task) == "relate":
        wording = wordings.get("context") or wordings["user"]
        more["spans"] = [
            {"start": wording.written(s["start"]), "end": wording.written(s["end"]), "label": s["label"]}
            for s in record.target.spans or ()
            if s["label"] in ("head", "tail")
        ]
    return PredictRequest.model_validate({"task": record.task, "messages": messages, "context": context, **more})


def _candidate(each: Mapping[str, Any]) -> dict[str, Any]:
    words = "".join(text for what, text in segments(each.get("content") or "") if what == "text").strip()
    made: dict[str, Any] = {"text": words or None}
    for side in ("image", "audio"):
        if found := each.get(side):
            made[side] = _base64(found["bytes"])
    return made


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
