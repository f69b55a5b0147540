"""Pictures and sounds as rows name them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmagent.record import Media, RecordError
from mmagent.rows import parse


@pytest.mark.parametrize(
    ("form", "path"),
    [
        (lambda data: data, None),
        (lambda data: base64.b64encode(data).decode(), None),
        (lambda data: "data:image/png;base64," + base64.b64encode(data).decode(), None),
        (lambda data: {"bytes": data, "path": "a.png"}, "a.png"),
        (lambda data: {"bytes": base64.b64encode(data).decode()}, None),
    ],
)
def test_forms_of_media(make_png: Callable[..., bytes], form: Callable[[bytes], Any], path: str | None) -> None:
    noisy = make_png(size=(16, 16)) + bytes(range(256)) * 8  # long enough that base64 cannot be a path
    assert parse({"image": form(noisy), "label": "x"}).images == (Media(noisy, path),)


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(1 << 40)  # sparse: reading it would end this process
    with pytest.raises(RecordError, match="max_media_bytes is 1000"):
        parse({"text": "x", "image": "big.png"}, root=tmp_path, max_media_bytes=1000)
