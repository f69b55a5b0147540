"""CoNLL columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.choose import choose
from jobs.sources.conll import Conll
from mmagent.targets import words_of

EU = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC
call NN I-NP O
. . O O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""


def _values(reader: Conll) -> list[dict[str, Any]]:
    return [dict(row.values) for row in reader.rows() if row.values is not None]


def test_sentences_become_texts_and_spans(tmp_path: Path) -> None:
    file = tmp_path / "eng.conll"
    file.write_text(EU)
    source = choose(f"conll:{file}")
    rows = [row for row in source.rows(1) if isinstance(row, GoodRow)]
    assert [row.number for row in rows] == [3, 9]  # where the sentence begins
    assert {row.record.task for row in rows} == {"tag"}
    content = [row.record.messages[0].content for row in rows]
    assert content == ["EU rejects German call .", "Peter Blackburn"]
    found = [
        (words_of(text, span), span["label"])
        for text, row in zip(content, rows, strict=True)
        for span in row.record.target.spans or ()
    ]
    assert found == [("EU", "ORG"), ("German", "MISC"), ("Peter Blackburn", "PER")]


def test_tabs_comments_and_windows_lines(tmp_path: Path) -> None:
    file = tmp_path / "wnut.conll"
    file.write_bytes(
        "\ufeff# id 17 domain=en\r\n@x y\tO\r\n#\tO\r\nBerlin\tB-location\r\n\t \r\n# O\r\nZürich B-location".encode()
    )
    first, second = _values(Conll(file))
    assert first == {"text": "@x y # Berlin", "spans": [{"start": 7, "end": 13, "label": "location"}]}
    assert second == {"text": "# Zürich", "spans": [{"start": 2, "end": 8, "label": "location"}]}


def test_a_bad_sentence_costs_itself_and_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.conll"
    file.write_bytes(b"a O\nb\n\nc O\n\xff O\n\n\tO\n\nd O\n")
    rows = list(choose(f"conll:{file}").rows(1))
    reasons = [row.reason if isinstance(row, BadRow) else row.record.messages[0].content for row in rows]
    assert reasons == ["no word and tag", "not UTF-8", "no word and tag", "d"]
    assert isinstance(rows[0], BadRow)
    assert (rows[0].number, rows[0].file, rows[0].raw) == (1, str(file), "a O\nb")
    assert "line 2 is 'b'" in rows[0].message


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for name in ("wnut17train.conll", "emerging.dev.conll", "test.txt", "README.md"):
        (tmp_path / name).write_text("a B-X\n")
    source = choose(f"conll:{tmp_path}")
    assert source.splits == {"train", "validation", "test"}
    ids = {row.record.id: row.record.split for row in source.rows(1) if isinstance(row, GoodRow)}
    assert ids == {"wnut17train.conll-1": "train", "emerging.dev.conll-1": "validation", "test.txt-1": "test"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no files that end in \.conll"):
        choose(f"conll:{tmp_path / 'empty'}")
