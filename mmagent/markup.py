"""HTML and SVG that cannot be injected into: every text is escaped unless it is already `Markup`.

tag("p", "1 < 2", tag("b", user_text), class_="note")
"""

from __future__ import annotations

from html import escape
from typing import Any

_VOID = {"meta", "br", "img", "link", "hr", "col"}


class Markup(str):
    """Finished HTML, to be put in as it is."""

    __slots__ = ()


Child = Any  # Markup as it is; None nothing; a list or tuple its items; anything else its text, escaped


def tag(name: str, /, *children: Child, **attributes: Any) -> Markup:
    """An element. An attribute of None or False is left out, of True stands alone; ``class_`` is class, and other
    underscores are hyphens."""
    head = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        assert not children, f"<{name}> holds nothing"
        return Markup(f"<{head}>")
    return Markup(f"<{head}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """The children side by side."""
    out: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, (list, tuple)):
            out.append(join(*child))
        else:
            out.append(child if isinstance(child, Markup) else escape(str(child)))
    return Markup("".join(out))


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
