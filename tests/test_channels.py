"""A channel's history: what answers, beside which canary, and where a rollback goes; files that cannot be read."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmagent import channels
from mmagent.channels import ChannelError
from mmagent.storage import StorageError


def write(*acts: tuple[str, float, str]) -> channels.Channel:
    for bundle, share, act in acts:
        channels.append("c", bundle, share=share, act=act, by="tests")
    return channels.read("c")


def test_the_last_whole_promotion_answers(storage: Path) -> None:
    state = write(("/a", 1.0, "promote"), ("/b", 1.0, "promote"))
    assert (state.bundle, state.canary, state.before(), state.back()) == ("/b", None, "/a", "/a")


def test_a_canary_stands_beside_it_until_it_is_promoted_or_taken_back(storage: Path) -> None:
    state = write(("/a", 1.0, "promote"), ("/b", 0.1, "canary"))
    assert (state.bundle, state.canary, state.share, state.back()) == ("/a", "/b", 0.1, "/a")
    state = write(("/b", 1.0, "promote"))
    assert (state.bundle, state.canary, state.back()) == ("/b", None, "/a")
    assert len(state.lines) == 3


def test_a_rollback_of_a_rollback_goes_forth_again(storage: Path) -> None:
    state = write(("/a", 1.0, "promote"), ("/b", 1.0, "promote"), ("/a", 1.0, "rollback"))
    assert (state.bundle, state.back()) == ("/a", "/b")


def test_the_first_bundle_has_nothing_before_it(storage: Path) -> None:
    state = write(("/a", 1.0, "promote"), ("/a", 1.0, "promote"))
    assert (state.before(), state.back()) == (None, None)


def test_writers_take_turns(storage: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: channels.append("c", f"/b{n}", share=1.0, act="promote", by="t" * 4000), range(64)))
    state = channels.read("c")
    assert {line["bundle"] for line in state.lines} == {f"/b{n}" for n in range(64)}


def test_what_cannot_be_read_is_told(storage: Path) -> None:
    with pytest.raises(ChannelError, match=r"there is no channel 'c'.*channels are: none"):
        channels.read("c")
    channels.append("c", "/a", share=0.5, act="canary", by="tests")
    with pytest.raises(ChannelError, match="names no bundle"):
        channels.read("c")
    channels.file("c").write_text(json.dumps({"share": 1}) + "\n")
    with pytest.raises(ChannelError, match=r"line 1: names no bundle"):
        channels.read("c")
    with pytest.raises(StorageError):
        channels.file("../c")
