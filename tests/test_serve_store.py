"""What outlives a request, in SQLite and in Redis: the same for both."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.store import Held, NotYoursError, Store, open_store


@pytest.fixture(scope="module")
def redis_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
        process.terminate()


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    address = request.getfixturevalue("redis_address") if request.param == "redis" else ""
    opened = open_store(address, tmp_path)
    yield opened
    opened.close()


def test_a_list_grows_and_belongs_to_who_began_it(store: Store) -> None:
    store.append("conversation", "a", "me", [b"1", b"2"], 60)
    store.append("conversation", "a", "me", [b"\x003"], 60)
    assert store.read("conversation", "a") == Held("me", (b"1", b"2", b"\x003"))
    assert store.read("answer", "a") is None
    with pytest.raises(NotYoursError):
        store.append("conversation", "a", "you", [b"4"], 60)
    assert store.delete("conversation", "a")
    assert not store.delete("conversation", "a")
    assert store.read("conversation", "a") is None
    store.append("conversation", "a", "you", [b"5"], 60)
    assert store.read("conversation", "a") == Held("you", (b"5",))


def test_it_ends(store: Store) -> None:
    store.append("conversation", "short", "me", [b"1"], 0.2)
    store.append("conversation", "kept", "me", [b"1"], 0.2)
    store.append("conversation", "kept", "me", [b"2"], 60)  # the whole list lives on
    time.sleep(0.3)
    assert store.read("conversation", "short") is None
    assert store.read("conversation", "kept") == Held("me", (b"1", b"2"))
    store.append("conversation", "short", "you", [b"new"], 60)  # free for anyone again
    assert store.read("conversation", "short") == Held("you", (b"new",))


def test_one_item_in_place_of_another(store: Store) -> None:
    store.put("replica", "r1", "service", b"1", 60)
    store.put("replica", "r1", "service", b"2", 60)
    store.put("replica", "r2", "service", b"3", 60)
    assert store.read("replica", "r1") == Held("service", (b"2",))
    assert set(store.ids("replica", 10)) == {"r1", "r2"}
    assert len(store.ids("replica", 1)) == 1


def test_in_place_of_another_in_one_step(store: Store) -> None:
    store.put("replica", "r1", "service", b"0", 60)
    over = threading.Event()

    def put() -> None:
        for n in range(200):
            store.put("replica", "r1", "service", str(n).encode(), 60)
        over.set()

    thread = threading.Thread(target=put)
    thread.start()
    while not over.is_set():
        held = store.read("replica", "r1")
        assert held is not None
        assert len(held.items) == 1
    thread.join()


def test_a_counter_ends(store: Store) -> None:
    assert [store.count("claim", "a", 0.2), store.count("claim", "a", 60)] == [1, 2]
    time.sleep(0.3)
    assert store.count("claim", "a", 60) == 1


def test_counters_miss_nothing_when_many_count(store: Store) -> None:
    def count() -> None:
        for _ in range(25):
            store.count("requests", "k.today", 60)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.count("requests", "k.today", 60) == 101
    assert store.count("requests", "other", 60) == 1


def test_two_first_turns_of_one_name_have_one_winner(store: Store) -> None:
    won: list[str] = []

    def begin(owner: str) -> None:
        try:
            store.append("conversation", "race", owner, [owner.encode()], 60)
            won.append(owner)
        except NotYoursError:
            pass

    threads = [threading.Thread(target=begin, args=(f"o{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    held = store.read("conversation", "race")
    assert held == Held(won[0], (won[0].encode(),))
