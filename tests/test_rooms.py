"""The rooms of the package, and which way the arrows between their files point: see docs/architecture.md."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (  # a room is imported by those after it alone
    "dnp.engine.system",
    "dnp.engine.bundle",
    "dnp.engine.plans",
    "dnp.engine.backends",
    "dnp.runtime.sampling",
    "dnp.runtime.captioning",
    "dnp.runtime.pipeline",
    "dnp.export",
    "dnp.serving",
    "dnp.cli",
)


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Every module of the package with those that it imports: at once, when something is called, or for types alone."""
    files = {}
    for folder in ("dnp", "engine", "runtime", "export", "serving"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(part for part in ("dnp", *parts[folder == "dnp" :]) if part != "__init__")] = path
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[module] = (names & files.keys()) - {module, "dnp"}
    return found


def test_no_module_needs_itself(imports):
    assert len(imports) > 90
    TopologicalSorter(imports).prepare()


def test_arrows_point_one_way(imports):
    def place(module: str) -> int | None:
        return next((n for n, room in enumerate(ORDER) if module == room or module.startswith(f"{room}.")), None)

    for module, names in imports.items():
        for name in names:
            here, there = place(module), place(name)
            assert here is None or there is None or there <= here, f"{module} imports {name}"
