"""A Dockerfile read, and its steps run in folders made by debootstrap, where no Docker engine is at hand.

It knows what cluster/Dockerfile uses (FROM, ARG, ENV, RUN, COPY, WORKDIR, USER, and the words about the image itself)
and refuses the rest.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ABOUT_THE_IMAGE = ("EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD")
KNOWN = ("FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", *ABOUT_THE_IMAGE)
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass(frozen=True)
class Step:
    word: str
    rest: str


@dataclass
class Stage:
    name: str
    base: str
    steps: list[Step] = field(default_factory=list)

    def all(self, word: str) -> list[str]:
        return [step.rest for step in self.steps if step.word == word]


def read(file: Path) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first stage, and the stages.

    Raises:
        ValueError: a word that is not known here.
    """
    defaults: dict[str, str] = {}
    stages: list[Stage] = []
    for word, rest in _lines(file.read_text()):
        if word not in KNOWN:
            raise ValueError(f"{file}: {word} is not among {', '.join(KNOWN)}")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name or str(len(stages)), base.strip()))
        elif not stages:
            name, _, value = rest.partition("=")
            defaults[name] = value
        else:
            stages[-1].steps.append(Step(word, rest))
    return defaults, stages


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Instructions with their continuations; a comment within one belongs to nothing."""
    kept = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", "", "\n".join(kept)).splitlines():
        word, _, rest = line.strip().partition(" ")
        yield word.upper(), rest.strip()


def assignments(rest: str) -> dict[str, str]:
    """``NAME=value NAME=value`` of ENV."""
    return dict(item.split("=", 1) for item in shlex.split(rest))


class Builder:
    """Runs stages in folders below a place.

    Args:
        base: a folder made by debootstrap; each stage starts as a copy of it.
        context: the checkout, of which COPY takes.
        environment: of every RUN, beside the file's own: this machine's way to the packages.
        mounts: folders of this machine that a RUN sees.
    """

    def __init__(
        self, base: Path, place: Path, context: Path, environment: Mapping[str, str], mounts: tuple[Path, ...] = ()
    ) -> None:
        self._base, self._place, self._context = base, place, context
        self._environment, self._mounts = dict(environment), mounts
        self.roots: dict[str, Path] = {}

    def build(self, stage: Stage, arguments: Mapping[str, str]) -> dict[str, str]:
        """The stage's environment as an image carries it, with USER and WORKDIR as keys of their own."""
        root = self.roots[stage.name] = self._place / stage.name
        subprocess.run(["cp", "-a", "--reflink=auto", str(self._base), str(root)], check=True)
        values: dict[str, str] = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        given: dict[str, str] = {}
        where, user = "/", "0:0"
        for step in stage.steps:
            if step.word == "ARG":
                name, _, default = step.rest.partition("=")
                given[name] = arguments.get(name, default)
            elif step.word == "ENV":
                values |= {name: _filled(value, values) for name, value in assignments(step.rest).items()}
            elif step.word == "WORKDIR":
                where = step.rest
                (root / where.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif step.word == "USER":
                user = step.rest
            elif step.word == "COPY":
                self._copy(root, where, step.rest)
            elif step.word == "RUN":
                self.run(root, step.rest, given | values | self._environment, where, user)
        return values | {"USER": user, "WORKDIR": where}

    def run(
        self,
        root: Path,
        command: str,
        environment: Mapping[str, str],
        where: str,
        user: str,
        *,
        offline: bool = False,
        timeout_s: float = 1500,
    ) -> str:
        """What a command prints in a stage's folder, which has /proc, /dev and /sys for that long; what it started ends
        with it. Offline, it has a loopback of its own and no other network.

        Raises:
            AssertionError: its status is not zero.
        """
        uid, _, gid = user.partition(":")
        for mount in self._mounts:
            (root / str(mount).lstrip("/")).mkdir(parents=True, exist_ok=True)
        outside = [
            *(["ip link set lo up"] if offline else []),
            f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev", f"mount --rbind /sys {root}/sys",
            *(f"mount --bind {mount} {root}{mount}" for mount in self._mounts),
            'exec "$@"',
        ]  # fmt: skip
        inside = [
            "chroot", f"--userspec={uid}:{gid or uid}", str(root), "/usr/bin/env", "-i",
            *(f"{key}={value}" for key, value in environment.items()),
            "/bin/sh", "-c", f"cd {where} && {command}",
        ]  # fmt: skip
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", *(["--net"] if offline else []),
             "sh", "-ec", "\n".join(outside), "sh", *inside],
            check=False, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def _copy(self, root: Path, where: str, rest: str) -> None:
        words = rest.split()
        sources, target = [word for word in words[:-1] if not word.startswith("--")], words[-1]
        stage = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), None)
        origin = self.roots[stage] if stage else self._context
        into = root / os.path.join(where, target).lstrip("/")
        for source in sources:
            found = origin / source.lstrip("/")
            if found.is_dir():
                shutil.copytree(
                    found, into, symlinks=True, dirs_exist_ok=True,
                    ignore=None if stage else shutil.ignore_patterns("__pycache__", "*.pyc"),
                )  # fmt: skip
            else:
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, into)


def _filled(value: str, values: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda found: values.get(found[1] or found[2], ""), value)
