"""API keys: who may ask, give feedback, or act as an administrator. They lie as SHA-256, never readable.

    python -m serve.keys add --name app --scope ask --scope feedback --days 90 --per-minute 600
    python -m serve.keys list
    python -m serve.keys rotate key_1a2b3c4d --overlap-hours 24     # a new secret; the old one ends a day later
    python -m serve.keys revoke key_1a2b3c4d

A secret is printed once, when it is made. The file is ``serve/keys.json`` below the storage root, or ``--file``; a
running service reads it again within a second of a change. Keys in the environment (MMAGENT_API_KEYS) may do
everything, for as long as the service runs.

A key has a profile: the language and voice of what is spoken, and the skills (tasks) it may use.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import hmac
import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmagent import storage
from mmagent.arguments import Parser

Scope = Literal["ask", "feedback", "admin"]
SCOPES: tuple[Scope, ...] = ("ask", "feedback", "admin")
_LOOK_EVERY_S = 0.5


class KeyFileError(ValueError):
    """A key file that cannot be read, or a key that is not in it."""


class Profile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    language: str | None = Field(None, max_length=20, description="of what is spoken, where a voice names none: de")
    voice: str | None = Field(None, max_length=60, description="of what is spoken: en-us+f2")
    skills: tuple[str, ...] | None = Field(None, description="tasks that may be asked; none: all")


class Key(BaseModel):
    """One client. `hashes` has two while a rotation overlaps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str = Field(max_length=100)
    hashes: dict[str, int | None] = Field(repr=False, description="SHA-256 -> when it ends, in Unix ms, if ever")
    scopes: tuple[Scope, ...]
    created_ms: int = 0
    revoked_ms: int | None = None
    per_minute: int | None = Field(None, gt=0, description="requests a minute; none: the service's own limit")
    per_day: int | None = Field(None, gt=0, description="requests a day (UTC)")
    profile: Profile = Profile()
    keep: bool = Field(True, description="its questions may be kept, as far as the service's --keep says")

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes


ANYONE = Key(id="local", name="anyone on this machine", hashes={}, scopes=SCOPES)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a presented secret is no key."""

    code: Literal["invalid_api_key", "expired_api_key", "revoked_api_key"]
    reason: str


class Keys:
    """The keys of a service: those of the environment, and those of a file, which is looked at again as it changes.

    Args:
        file: none: only those of the environment.
        hashes: of the secrets that the environment holds.
    """

    def __init__(self, file: Path | None, hashes: Sequence[str] = ()) -> None:
        self._file = file
        self._fixed = [
            Key(id=f"env_{index + 1}", name=f"MMAGENT_API_KEYS {index + 1}", hashes={digest: None}, scopes=SCOPES)
            for index, digest in enumerate(hashes)
        ]
        self._read: list[Key] = []
        self._stamp: tuple[int, int] | None = None
        self._looked_s = float("-inf")

    @property
    def wanted(self) -> bool:
        """Whether a key is wanted at all."""
        self._look()
        return bool(self._fixed or self._read)

    def find(self, secret: str) -> Key | Refused:
        """The key of a secret, or why there is none. Takes as long for a wrong one as for a right one."""
        self._look()
        digest, found = hash_of(secret), None
        for key in (*self._fixed, *self._read):
            for known, ends_ms in key.hashes.items():
                if hmac.compare_digest(digest, known):
                    found = key, ends_ms
        if found is None:
            return Refused("invalid_api_key", "the API key is wrong")
        key, ends_ms = found
        if key.revoked_ms is not None:
            return Refused("revoked_api_key", "the API key was revoked")
        if ends_ms is not None and ends_ms <= _now_ms():
            return Refused("expired_api_key", "the API key has expired")
        return key

    def _look(self) -> None:
        if self._file is None or time.monotonic() - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = time.monotonic()
        try:
            state = self._file.stat()
        except FileNotFoundError:
            # A file that vanished opens no door: whoever had a key still needs one.
            return
        if (stamp := (state.st_mtime_ns, state.st_size)) != self._stamp:
            self._read, self._stamp = read(self._file), stamp


def default_file() -> Path:
    return storage.folder("serve", "keys").with_name("keys.json")


def read(file: Path) -> list[Key]:
    """The keys of a file; none where there is no file.

    Raises:
        KeyFileError: it cannot be read.
    """
    try:
        return [Key.model_validate(each) for each in json.loads(file.read_text())["keys"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise KeyFileError(f"the key file {file} cannot be read ({str(error).splitlines()[0]}): restore it") from error


def hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def add(file: Path, key: Key, *, days: float | None) -> str:
    """Writes a new key into the file; its secret."""
    secret = _secret()
    held = key.model_copy(update={"hashes": {hash_of(secret): _in_days(days)}, "created_ms": _now_ms()})
    _change(file, lambda keys: [*keys, held])
    return secret


def rotate(file: Path, id: str, *, days: float | None, overlap_hours: float) -> str:
    """A new secret of a key; its older ones end after the overlap."""
    secret, ends_ms = _secret(), _now_ms() + int(overlap_hours * 3_600_000)

    def turned(key: Key) -> Key:
        older = {h: ends_ms if ends is None else min(ends, ends_ms) for h, ends in key.hashes.items()}
        live = {h: ends for h, ends in older.items() if ends > _now_ms()}
        return key.model_copy(update={"hashes": {**live, hash_of(secret): _in_days(days)}})

    _change(file, _one(id, turned))
    return secret


def revoke(file: Path, id: str) -> None:
    _change(file, _one(id, lambda key: key.model_copy(update={"revoked_ms": _now_ms()})))


def _one(id: str, change: Callable[[Key], Key]) -> Callable[[list[Key]], list[Key]]:
    def all_of(keys: list[Key]) -> list[Key]:
        if id not in [key.id for key in keys]:
            raise KeyFileError(f"there is no key {id!r}; these are: {', '.join(key.id for key in keys) or 'none'}")
        return [change(key) if key.id == id else key for key in keys]

    return all_of


def _change(file: Path, change: Callable[[list[Key]], list[Key]]) -> None:
    """Two commands at once change it one after the other."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(file.with_suffix(".lock").open("w")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = change(read(file))
        storage.publish_json(file, {"keys": [key.model_dump(mode="json") for key in keys]})
        file.chmod(0o600)


def _secret() -> str:
    return "mma_" + secrets.token_urlsafe(32)


def _now_ms() -> int:
    return int(time.time() * 1000)


def _in_days(days: float | None) -> int | None:
    return None if days is None else _now_ms() + int(days * 86_400_000)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    file = args.file or default_file()
    try:
        if args.what == "add":
            profile = Profile(language=args.language, voice=args.voice, skills=tuple(args.skill) or None)
            key = Key(
                id=f"key_{secrets.token_hex(4)}", name=args.name, hashes={}, scopes=tuple(args.scope or ["ask"]),
                per_minute=args.per_minute, per_day=args.per_day, profile=profile, keep=not args.no_keep,
            )  # fmt: skip
            secret = add(file, key, days=args.days)
            print(f"{key.id}  {secret}\n(the secret is shown this once)")
        elif args.what == "rotate":
            secret = rotate(file, args.id, days=args.days, overlap_hours=args.overlap_hours)
            print(f"{args.id}  {secret}\n(the secret is shown this once; the old one ends in {args.overlap_hours:g} h)")
        elif args.what == "revoke":
            revoke(file, args.id)
            print(f"revoked {args.id}: running services refuse it within a second")
        else:
            _list(read(file))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _list(keys: Sequence[Key]) -> None:
    if not keys:
        print("no keys: python -m serve.keys add --name NAME makes one")
    for key in keys:
        ends = [ends for ends in key.hashes.values() if ends is None or ends > _now_ms()]
        state = "revoked" if key.revoked_ms else "expired" if not ends else "live"
        if state == "live" and None not in ends:
            state += f" until {time.strftime('%Y-%m-%d', time.gmtime(max(e for e in ends if e) / 1000))}"
        print(f"{key.id}  {state:<22} {','.join(key.scopes):<20} {key.name}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser("serve.keys", __doc__)
    parser.add_argument("--file", type=Path, help="the key file (serve/keys.json below the storage root)")
    commands = parser.add_subparsers(dest="what", required=True, metavar="{add,list,rotate,revoke}")
    new = commands.add_parser("add", help="a new key")
    new.add_argument("--name", required=True, help="whose it is")
    new.add_argument("--scope", action="append", choices=SCOPES, help="what it may do (ask); more than once for more")
    new.add_argument("--per-minute", type=int, metavar="N", help="requests a minute")
    new.add_argument("--per-day", type=int, metavar="N", help="requests a day")
    new.add_argument("--language", help="of what is spoken to it")
    new.add_argument("--voice", help="of what is spoken to it")
    new.add_argument("--skill", action="append", default=[], help="a task that it may ask; more than once for more")
    new.add_argument("--no-keep", action="store_true", help="never keep its questions, whatever --keep of the service")
    turn = commands.add_parser("rotate", help="a new secret for a key")
    turn.add_argument(
        "--overlap-hours", type=float, default=24.0, help="how long the old secret lives on (%(default)s)"
    )
    for each in (new, turn):
        each.add_argument("--days", type=float, help="until the secret expires; never, where not given")
    end = commands.add_parser("revoke", help="refuse a key from now on")
    for each in (turn, end):
        each.add_argument("id", help="as `list` shows it")
    commands.add_parser("list", help="all keys, without their secrets")
    return parser


if __name__ == "__main__":
    main()
