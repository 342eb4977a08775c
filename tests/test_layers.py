"""The table of layers, who may import whom, and the walls around third parties, as tests."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS: dict[str, int] = {
    "toolkit.errors": -1, "toolkit.shipped": 0, "toolkit.disk": 0, "toolkit.quiet": 0, "toolkit.pages": 0,
    "toolkit.recipe": 1, "toolkit.bundle": 1, "toolkit.trackers": 2, "toolkit.track": 3,
    "toolkit.evaluate.metrics": 1, "toolkit.evaluate.levels": 1,
    "toolkit.adapters": 2, "toolkit.bases": 2,
    "toolkit.corpus": 3, "toolkit.card": 3,
    "toolkit.sampling": 1, "toolkit.grammar": 1, "toolkit.writing": 2,
    "toolkit.stack": 4, "toolkit.loaded": 4,
    "toolkit.generate": 5, "toolkit.score": 5,
    "toolkit.combine": 6, "toolkit.evaluate": 6,
    "toolkit.fit": 7,
    "toolkit.search": 8,
    "toolkit.ensemble": 9,
    "toolkit.report": 10, "toolkit.check": 10, "toolkit.start": 10, "toolkit.judge": 10,
    "toolkit.chat": 10, "toolkit.export": 10, "toolkit.spoken": 10,
    "toolkit.steps": 11, "toolkit.choose": 11, "toolkit.jury": 11,
    "toolkit.labelling": 12,
    "toolkit.pipeline": 13, "toolkit.searching": 13, "toolkit.combining": 14,
    "toolkit.train": 15, "toolkit.__main__": 16,
    "serve": 20,
}  # fmt: skip
SERVE_MAY_IMPORT = 6


def modules() -> list[tuple[str, Path]]:
    found = [p for package in ("toolkit", "serve") for p in (ROOT / package).rglob("*.py") if p.name != "__init__.py"]
    return [(".".join(p.relative_to(ROOT).with_suffix("").parts), p) for p in sorted(found)]


def room(module: str) -> tuple[str, int]:
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        name = ".".join(parts[:n])
        if name in LAYERS:
            return name, LAYERS[name]
    raise AssertionError(f"{module} is in no layer of the table")


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_walk_finds_the_rooms() -> None:
    assert len(modules()) > 20


@pytest.mark.parametrize(("module", "path"), modules(), ids=[m for m, _ in modules()])
def test_a_file_imports_only_lower_layers_or_its_own_folder(module: str, path: Path) -> None:
    own, layer = room(module)
    for name in sorted(imports(path)):
        if name.split(".")[0] not in ("toolkit", "serve") or name in ("toolkit", "serve"):
            continue
        other, number = room(name)
        if other == own or other.split(".")[:2] == own.split(".")[:2]:
            continue
        if own == "serve":
            assert number <= SERVE_MAY_IMPORT, f"{module} imports {name}"
        else:
            assert number < layer, f"{module} (layer {layer}) imports {name} (layer {number})"


WALLS = {
    "trl": ("toolkit.fit",),
    "optuna": ("toolkit.search",),
    "wandb": ("toolkit.track",),
    "gradio": ("serve.ui", "serve.__main__"),
    "llguidance": ("toolkit.grammar",),
    "opentelemetry": ("serve.tracing",),
    "fastapi": ("serve.api", "serve.admin", "serve.guard", "serve.__main__"),
}


@pytest.mark.parametrize(("package", "rooms"), WALLS.items(), ids=list(WALLS))
def test_a_third_party_is_named_in_its_own_rooms_only(package: str, rooms: tuple[str, ...]) -> None:
    for module, path in modules():
        if package in {name.split(".")[0] for name in imports(path)}:
            assert module.startswith(rooms), f"{module} imports {package}"


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["toolkit.recipe.read", "toolkit.train", "toolkit.__main__", "toolkit.bundle"])
def test_reading_a_recipe_loads_nothing_heavy(module: str) -> None:
    heavy = {
        "torch",
        "transformers",
        "peft",
        "trl",
        "optuna",
        "wandb",
        "gradio",
        "fastapi",
        "datasets",
        "sklearn",
        "numpy",
    }
    assert not loaded_by(module) & heavy
