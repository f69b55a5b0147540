"""WebDataset's tars."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.sources import BadRow, GoodRow, SourceError
from jobs.sources.choose import choose


def _tar(file: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def test_neighbours_of_one_name_are_a_row(
    tmp_path: Path, make_png: Callable[..., bytes], make_wav: Callable[..., bytes]
) -> None:
    members = {
        "./a/1.png": make_png(), "./a/1.cls": b"cat\n", "./a/1.left.txt": b"what <image>?", "./a/1.npy": b"x",
        "./a/2.wav": make_wav(), "./a/2.json": json.dumps({"label": "dog", "text": "hm", "shop": "north"}).encode(),
        "3.jpg": b"no picture", "3.cls": b"cat", "4.json": b"[1]", "5.json": b"{", "6.0.png": make_png(),
        "6.1.png": make_png("blue"), "6.cls": b"cat",
    }  # fmt: skip
    rows = list(choose(f"webdataset:{_tar(tmp_path / 'x.tar', members)}").rows(1))
    good = [row.record for row in rows if isinstance(row, GoodRow)]
    assert [(record.id, record.modalities, record.target.label) for record in good] == [
        ("x.tar/a/1", "text+image", "cat"), ("x.tar/a/2", "text+audio", "dog"), ("x.tar/6", "image", "cat"),
    ]  # fmt: skip
    assert good[0].messages[0].content == "<image> what \\<image>?"
    assert good[0].images[0].bytes == make_png()
    assert good[1].meta["shop"] == "north"
    assert [media.bytes for media in good[2].images] == [make_png(), make_png("blue")]
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert [(row.id, row.reason) for row in bad] == [
        ("x.tar/3", "image damaged"), ("x.tar/4", "not readable"), ("x.tar/5", "not readable"),
    ]  # fmt: skip
    assert "4.json: it holds list, but an object is wanted" in bad[1].message


def test_captions_are_answers_by_a_map(tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    file = _tar(tmp_path / "x.tar", {"1.png": make_png(), "1.txt": b"a red square"})
    (row,) = choose(f"webdataset:{file}", columns={"answer": "text"}).rows(1)
    assert isinstance(row, GoodRow)
    assert (row.record.task, row.record.target.text, row.record.modalities) == ("generate", "a red square", "image")


def test_several_tars(tmp_path: Path) -> None:
    for name in ("train/000.tar", "train/001.tar.gz", "test/000.tar", "more-0.tar", "more-1.tar"):
        mode = "w:gz" if name.endswith("gz") else "w"
        _tar(tmp_path / name, {"1.txt": b"t", "1.cls": b"a"}, mode)
    source = choose(f"webdataset:{tmp_path}")
    assert source.total == 5
    assert source.splits == {"train", "test"}
    assert choose(f"webdataset:{tmp_path}/more-*.tar").total == 2
    with pytest.raises(SourceError, match=r"no file in .* is of the pattern less-\*\.tar"):
        choose(f"webdataset:{tmp_path}/less-*.tar")
    broken = tmp_path / "broken.tar"
    broken.write_bytes((tmp_path / "more-0.tar").read_bytes()[:700])
    with pytest.raises(SourceError, match=r"broken\.tar cannot be read as a tar"):
        choose(f"webdataset:{broken}")
