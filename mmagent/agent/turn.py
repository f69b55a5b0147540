"""One turn of an agent: from what the model understood to what is said and done, step by step.

A step is data: the trace of an answer is its steps. Nothing here knows a model, a network or a database; what it needs
of them comes as functions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmagent.agent.policy import Policy, Rule
from mmagent.agent.tools import Result, Tool, run
from mmagent.agent.wording import MissingError, fill, fill_value

Outcome = Literal["answer", "reply", "tool", "call", "retrieved", "ask", "handover"]


@dataclass(frozen=True, slots=True)
class Understood:
    """What the model made of a request."""

    words: str  # its answer as one would say it
    label: str | None
    confidence: float
    threshold: float  # below it the agent is unsure
    likely: tuple[str, ...] = ()  # labels, likeliest first
    slots: Mapping[str, str] = field(default_factory=dict)
    text: str = ""  # what was asked


@dataclass(frozen=True, slots=True)
class Passage:
    """Something found in the knowledge."""

    text: str
    source: str
    score: float
    title: str = ""
    answer: str | None = None  # of a past conversation: what was answered

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "title": self.title, "text": self.text, "score": round(self.score, 4)}


@dataclass(frozen=True, slots=True)
class Step:
    kind: str
    ms: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "ms": self.ms, **self.facts}


@dataclass(frozen=True, slots=True)
class Turn:
    """What became of a request.

    Args:
        calls: of the client's own tools, which the client makes.
    """

    words: str
    outcome: Outcome
    steps: tuple[Step, ...] = ()
    sources: tuple[Passage, ...] = ()
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()


Retrieve = Callable[[str, int], Awaitable[tuple[Sequence[Passage], float]]]  # question, how many -> passages, ms


async def take(
    policy: Policy,
    understood: Understood,
    tools: Mapping[str, Tool],
    *,
    retrieve: Retrieve | None = None,
    theirs: Mapping[str, Tool] | None = None,
) -> Turn:
    """
    Args:
        tools: the agent's own.
        theirs: the client's: a rule that means one of them ends the turn with a call for the client to make.
    """
    if understood.confidence < understood.threshold:
        return await _unsure(policy, understood, retrieve)
    rule = policy.rule(understood.label)
    if rule is None:
        return Turn(understood.words, "answer")
    values = _values(understood)
    if rule.tool is not None:
        return await _used(policy, rule, values, {**tools, **(theirs or {})}, theirs or {}, understood)
    words = _filled(rule.reply, values, understood.words)
    if rule.handover:
        return Turn(words if rule.reply else policy.handover.reply, "handover", (Step("handover", 0.0),))
    return Turn(words, "reply", (Step("rule", 0.0, {"label": understood.label}),))


async def _used(
    policy: Policy,
    rule: Rule,
    values: dict[str, Any],
    tools: Mapping[str, Tool],
    theirs: Mapping[str, Tool],
    understood: Understood,
) -> Turn:
    assert rule.tool is not None
    arguments: dict[str, Any] = {}
    for key, template in rule.arguments.items():
        try:
            arguments[key] = fill_value(template, values)
        except MissingError:
            if key in rule.ask:
                return Turn(rule.ask[key], "ask", (Step("missing", 0.0, {"tool": rule.tool, "argument": key}),))
            if key in tools[rule.tool].wanted:
                return Turn(f"I need to know the {key} for that.", "ask", (Step("missing", 0.0, {"argument": key}),))
    if rule.tool in theirs:
        return Turn("", "call", (), (), ((rule.tool, arguments),))
    result = await run(tools[rule.tool], arguments)
    step = tool_step(rule.tool, arguments, result)
    if result.error:
        if rule.handover:
            return Turn(policy.handover.reply, "handover", (step, Step("handover", 0.0)))
        return Turn(rule.failed, "tool", (step,))
    words = _filled(rule.reply, {**values, "result": result.value}, result.words)
    if rule.handover:
        return Turn(words, "handover", (step, Step("handover", 0.0)))
    return Turn(words, "tool", (step,))


async def _unsure(policy: Policy, understood: Understood, retrieve: Retrieve | None) -> Turn:
    steps: list[Step] = []
    for way in policy.unsure:
        if way == "retrieve" and retrieve is not None and policy.knowledge is not None and understood.text:
            passages, ms = await retrieve(understood.text, policy.knowledge.passages)
            good = tuple(each for each in passages if each.score >= policy.knowledge.at_least)
            steps.append(Step("retrieve", ms, {"found": len(good), "best": _best(passages)}))
            if good:
                return Turn(quoted(good[0]), "retrieved", tuple(steps), good)
        if way == "ask" and (len(understood.likely) > 1 or "{" not in policy.ask):
            return Turn(_filled(policy.ask, _values(understood), policy.ask), "ask", (*steps, Step("ask", 0.0)))
        if way == "handover":
            return Turn(policy.handover.reply, "handover", (*steps, Step("handover", 0.0)))
        if way == "answer":
            return Turn(understood.words, "answer", tuple(steps))
    return Turn(policy.handover.reply, "handover", (*steps, Step("handover", 0.0)))


def quoted(passage: Passage) -> str:
    """What is said where a passage answers: its words, and where they stand."""
    return f"{passage.answer or passage.text}\n\n({passage.title or passage.source})"


def tool_step(name: str, arguments: Mapping[str, Any], result: Result) -> Step:
    """A call as the trace has it: what was given, and whether it worked; what came back may be private."""
    return Step("tool", result.ms, {"tool": name, "arguments": dict(arguments), "error": result.error or None})


def _values(understood: Understood) -> dict[str, Any]:
    likely = (*understood.likely, "", "")
    return {
        "label": understood.label,
        "slots": dict(understood.slots),
        "text": understood.words,
        "first": likely[0].replace("_", " ") or None,
        "second": likely[1].replace("_", " ") or None,
    }


def _filled(template: str | None, values: Mapping[str, Any], otherwise: str) -> str:
    if template is None:
        return otherwise
    try:
        return fill(template, values)
    except MissingError:
        return otherwise


def _best(passages: Sequence[Passage]) -> float | None:
    return round(max(each.score for each in passages), 4) if passages else None
