"""The token that Ray asks everybody for who wants to run something: where it lies, and making it where none is."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path


def path(env: Mapping[str, str]) -> Path:
    """Where Ray looks for its token: ``RAY_AUTH_TOKEN_PATH``, else ``~/.ray/auth_token``."""
    return Path(env.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def read(env: Mapping[str, str]) -> str | None:
    """The token; none where there is none."""
    if token := env.get("RAY_AUTH_TOKEN"):
        return token
    file = path(env)
    return file.read_text().strip() or None if file.is_file() else None


def ensure(env: Mapping[str, str]) -> None:
    """Makes a token, readable by this user only, where there is none yet.

    Raises:
        OSError: its folder cannot be written.
    """
    if read(env):
        return
    file = path(env)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(secrets.token_hex(32))
    try:
        os.link(draft, file)  # unlike a rename it never replaces a token that others already use
    except FileExistsError:
        pass
    finally:
        draft.unlink()
