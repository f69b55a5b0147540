"""What a model folder says about its licence."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_LICENCES = (  # how the text of a well-known licence begins, and its SPDX-like name on the hub
    (r"apache license\s+version 2\.0", "apache-2.0"),
    (r"\bmit license\b", "mit"),
    (r"bsd 3-clause", "bsd-3-clause"),
)


def read(folder: Path) -> str | None:
    """The licence that a folder names in the front matter of its README.md or in its licence file; None
    where it says nothing that is understood."""
    readme = folder / "README.md"
    if readme.is_file():
        found = _FRONT_MATTER.match(readme.read_text(errors="replace"))
        try:
            front = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError:
            front = None  # a README that is no card says nothing
        if isinstance(front, dict) and isinstance(front.get("license"), str):
            return str(front["license"])
    for file in sorted(folder.glob("LICENSE*")):
        words = file.read_text(errors="replace")[:2000].lower()
        for pattern, name in _LICENCES:
            if re.search(pattern, words):
                return name
    return None
