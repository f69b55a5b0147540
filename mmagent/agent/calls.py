"""Calls of tools in what a model writes. Chat templates teach models several ways; these are read:

<tool_call>{"name": "f", "arguments": {...}}</tool_call>        Hermes, Qwen
[TOOL_CALLS][{"name": "f", "arguments": {...}}]                 Mistral
{"name": "f", "parameters": {...}}                              Llama 3
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_OPENING = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|tool_call|>")
_CLOSING = ("</tool_call>", "<|/tool_call|>")


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: Mapping[str, Any]


def parse(text: str, known: Collection[str]) -> tuple[str, list[Call]]:
    """What is said beside calls, and the calls of known tools in their order. JSON among other words is no call."""
    calls: list[Call] = []
    said, at, decoder = "", 0, json.JSONDecoder()
    bare = not any(sign in text for sign in _OPENING)
    while at < len(text):
        sign = next((sign for sign in (*_OPENING, *_CLOSING) if text.startswith(sign, at)), None)
        if sign is not None:
            at += len(sign)
            continue
        if text[at] in "{[" and (not bare or not text[:at].strip()):
            try:
                found, end = decoder.raw_decode(text, at)
            except ValueError:
                found, end = None, at
            made = [_call(each, known) for each in (found if isinstance(found, list) else [found])]
            if made and None not in made:
                calls += [call for call in made if call is not None]
                at = end
                continue
        said += text[at]
        at += 1
    return (said.strip() if calls else text), calls


def _call(found: Any, known: Collection[str]) -> Call | None:
    if not isinstance(found, dict) or found.get("name") not in known:
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    return Call(str(found["name"]), arguments) if isinstance(arguments, dict) else None
