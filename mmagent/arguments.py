"""A command's arguments: an unknown flag is refused with the nearest right one, and never completed by guessing."""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn

_DESCRIBED: ContextVar[bool] = ContextVar("described", default=False)  # a command is asked for its parser, not run


class _Described(BaseException):
    def __init__(self, parser: Parser) -> None:
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as manual. Errors end the command with status 2 and one message.

    Args:
        keys: dotted keys that the command takes as ``key.path=value``: who writes one as a flag is told.
    """

    def __init__(self, prog: str, manual: str | None = None, *, keys: Iterable[str] = (), **settings: Any) -> None:
        self._keys = {key.rpartition(".")[2]: key for key in keys}
        super().__init__(
            prog=prog if prog.startswith("python ") else f"python -m {prog}",  # of a command within a command
            description=inspect.cleandoc(manual or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        if _DESCRIBED.get():
            raise _Described(self)
        given = list(sys.argv[1:] if args is None else args)
        flags = sorted(flag for parser in (self, *self._within()) for a in parser._actions for flag in a.option_strings)
        for item in given[: given.index("--")] if "--" in given else given:
            flag = item.partition("=")[0]
            if item.startswith("--") and flag not in flags:
                self.error(f"unknown flag {flag}: did you mean {self._nearest(flag, flags)}? --help lists all")
        return super().parse_args(given, namespace)

    def _within(self) -> list[argparse.ArgumentParser]:
        """The parsers of commands within this one."""
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return [parser for group in groups for parser in group.choices.values()]

    def _nearest(self, flag: str, flags: Sequence[str]) -> str:
        word = flag.removeprefix("--").replace("-", "_")
        if word in self._keys or word in self._keys.values():
            return f"{self._keys.get(word, word)}=VALUE"
        return difflib.get_close_matches(flag, flags, n=1, cutoff=0.0)[0]

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def parser_of(main: Callable[[Sequence[str]], Any]) -> Parser:
    """The parser that a command's `main` makes, with nothing of the command done: for pages that list its flags, and
    for tests of what these pages say.

    Raises:
        TypeError: it reads no arguments by a `Parser`.
    """
    mark = _DESCRIBED.set(True)
    try:
        main([])
    except _Described as described:
        return described.parser
    finally:
        _DESCRIBED.reset(mark)
    raise TypeError(f"{main} ended without reading its arguments by a Parser")


def mapping(text: str) -> dict[str, str]:
    """The value of a flag: ``FIELD=COLUMN,...``."""
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    if not pairs or any(not field.strip() or not column.strip() for field, _, column in pairs):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no map: FIELD=COLUMN,... is wanted, e.g. text=question,label=answer"
        )
    return {field.strip(): column.strip() for field, _, column in pairs}


def positive(text: str) -> int:
    """The value of a flag: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is given, but 1 or more is wanted")
    return int(text)
