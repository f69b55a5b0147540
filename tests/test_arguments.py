"""What a command says to a flag that it has not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mmagent.arguments import Parser, parser_of


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--sorce", "did you mean --source?"),
        ("--max-steps", "did you mean train.max_steps=VALUE?"),
        ("--train.max_steps=3", "did you mean train.max_steps=VALUE?"),
    ],
)
def test_an_unknown_flag_names_what_was_meant(flag: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("jobs.anything", "A manual.", keys=["train.max_steps", "optim.lr"])
    parser.add_argument("--source")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([flag])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_commands_parser_without_the_command() -> None:
    done = []

    def main(argv: Sequence[str] | None = None) -> None:
        parser = Parser("jobs.anything", "A manual.")
        parser.add_argument("--source", required=True)
        done.append(parser.parse_args(argv).source)

    found = parser_of(main)
    assert done == []
    assert found.parse_args(["--source", "x"]).source == "x"  # and afterwards it reads as ever
    with pytest.raises(TypeError, match="without reading its arguments"):
        parser_of(print)
