"""Templates of replies and arguments: ``{slots.ORDER}``, ``{result.amount}``, ``{label}``. Names and nothing else: no
attributes of objects, no calls, no formats; what is put in is never looked at again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9][A-Za-z0-9_-]*)*")
_ROOTS = ("label", "slots", "result", "first", "second", "text", "sources")
_MISSING = object()


class TemplateError(ValueError):
    """A template that cannot be read, or a name in it that nothing has."""


class MissingError(TemplateError):
    """A name that has no value in this turn."""


def names(template: str) -> list[str]:
    """The names that a template wants.

    Raises:
        TemplateError: a brace without its partner, or a name that is none.
    """
    found = []
    for match in _FIELD.finditer(template):
        if match[0] in ("{{", "}}"):
            continue
        if match[1] is None:
            raise TemplateError(f"{template!r:.80}: a brace without its partner; a brace itself is written twice")
        name = match[1].strip()
        if not _NAME.fullmatch(name) or name.split(".")[0] not in _ROOTS:
            raise TemplateError(f"{template!r:.80}: {{{name}}} is no name; these are: {', '.join(_ROOTS)}")
        found.append(name)
    return found


def fill(template: str, values: Mapping[str, Any]) -> str:
    """
    Raises:
        MissingError: a name has no value.
    """

    def one(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        return _words(_value(match[1].strip(), values))

    return _FIELD.sub(one, template)


def fill_value(template: Any, values: Mapping[str, Any]) -> Any:
    """As `fill`; a template that is one name alone gives its value as it is, a number as a number."""
    if not isinstance(template, str):
        return template
    only = _FIELD.fullmatch(template)
    if only is not None and only[1] is not None:
        return _value(only[1].strip(), values)
    return fill(template, values)


def _value(name: str, values: Mapping[str, Any]) -> Any:
    found: Any = values
    for part in name.split("."):
        if isinstance(found, Mapping):
            found = found.get(part, _MISSING)
        elif isinstance(found, (list, tuple)) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        else:
            found = _MISSING
        if found is _MISSING or found is None:
            raise MissingError(f"{{{name}}} has no value here")
    return found


def _words(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    return str(value)
