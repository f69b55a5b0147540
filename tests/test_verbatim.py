"""Training text that comes back word by word is found; what the question itself holds is no repetition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs import verbatim
from mmagent import predictions
from mmagent.record import Record
from mmagent.rows import parse
from mmagent.shards import Dataset

SECRET = "the code of the vault in the old house is nine four two seven"


def answers(**said: str) -> pa.Table:
    rows: list[dict[str, Any]] = [
        {"id": id, "group": id, "task": "generate", "without": "", "predicted": words} for id, words in said.items()
    ]
    return pa.Table.from_pylist(rows, predictions.schema(()))


def test_runs_of_training_words_are_found(make_dataset: Callable[..., Dataset], tmp_path: Path) -> None:
    told = [SECRET if n == 3 else f"a short reply {n}" for n in range(8)]
    rows = [parse({"id": f"t{n}", "text": "ask", "answer": each, "task": "generate"}) for n, each in enumerate(told)]
    learned = make_dataset(tmp_path / "learned", {"train": rows})
    asked: list[Record] = [
        parse({"id": "leaks", "text": "what is it?", "task": "generate"}),
        parse({"id": "new", "text": "what is it?", "task": "generate"}),
        parse({"id": "quotes", "text": f"repeat after me: {SECRET}", "task": "generate"}),
    ]
    said = answers(
        leaks="well, The code of the vault in the old house is nine four", new="the code of the vault is nine",
        quotes=SECRET,
    )  # fmt: skip
    found = verbatim.repeated(said, asked, learned, "generate")
    assert (found["n"], found["repeated"]) == (3, 1)
    assert found["examples"] == [{"id": "leaks", "words": "the code of the vault in the old house is nine four"}]
    assert verbatim.line(found) == "1 of 3 written answers hold 8 words or more of a training text"
