"""Importing the package needs torch alone, and imports inside it point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lockin_fast

PACKAGE = Path(lockin_fast.__file__).parent
# A room, that is a file or folder directly under lockin_fast/, may import from lower layers and from its own.
LAYERS = [
    {"typed_mapping", "progress", "rundir", "threads", "processes", "watching", "labels", "checkpoint"},
    {"kernels"},
    {"dispatch"},
    {"ops"},
    {"sae"},
    {"cache", "quantized"},
    {
        "chat", "blocking", "lora", "resuming", "train", "generation", "organism", "judges", "config", "inputs",
        "exam", "steering", "discovery", "patching", "settings", "patch_settings", "judge_settings", "sweep_settings",
        "variants", "paper_names", "measure_settings",
    },
    {"stacked"},
    {"lockin"},
    {"sweep", "report", "monitor"},
    {"caching"},
    {"plan"},
    {"doctor", "demo", "terminal"},
    {"cli"},
]
HEAVY = {
    "transformers", "peft", "accelerate", "trl", "bitsandbytes", "triton", "ray", "matplotlib", "jinja2", "typer",
    "rich", "scipy", "ruptures", "pyarrow",
}  # fmt: skip
BELOW_BLOCKING = {"kernels", "dispatch", "ops", "sae", "cache"}


def room(path):
    """The file or folder directly under the package that `path` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every absolute module name that a file imports, at its top or inside its functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(("lockin_fast", *path.relative_to(PACKAGE).parts[:-1]))
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names.add(module)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def top_level_imports(path):
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


SOURCES = sorted(PACKAGE.rglob("*.py"))


def graph():
    """room -> the rooms it imports."""
    edges = {}
    rooms = {room(path) for path in SOURCES}
    for path in SOURCES:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "lockin_fast" and len(parts) > 1 and parts[1] in rooms and parts[1] != room(path):
                edges.setdefault(room(path), set()).add(parts[1])
    return edges


def test_imports_point_one_way():
    edges = graph()
    order = {name: height for height, layer in enumerate(LAYERS) for name in layer}
    for source, targets in edges.items():
        for target in targets:
            assert source not in BELOW_BLOCKING or target in order, f"{source} imports {target}, of no known layer"
            if source in order and target in order:
                assert order[target] <= order[source], f"{source} imports {target}, which is above it"
    assert edges["ops"] >= {"dispatch"} and edges["dispatch"] >= {"kernels"}


def test_no_two_rooms_import_each_other():
    edges = graph()

    def reachable(start):
        seen, todo = set(), [start]
        while todo:
            for target in edges.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return seen

    circular = sorted(name for name in edges if name in reachable(name))
    assert not circular, f"circular: {circular}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_below_blocking_imports_the_trainer_stack(path):
    if room(path) in BELOW_BLOCKING:
        heavy = {name.partition(".")[0] for name in imports(path)} & HEAVY
        allowed = {"triton"} if "kernels/triton" in path.as_posix() else set()
        assert heavy <= allowed


TORCH_ALONE = """
import importlib, sys
import torch
allowed = set(sys.stdlib_module_names) | {name.partition(".")[0] for name in sys.modules} | {"lockin_fast"}
class Alone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)
sys.meta_path.insert(0, Alone())
import lockin_fast
h = torch.randn(4, 8, requires_grad=True)
penalty = lockin_fast.block_penalty(h, torch.randn(3, 8), torch.zeros(3), torch.ones(3), z_ref=torch.zeros(4, 3))
penalty.total.backward()
lockin_fast.latent_stats(h, torch.randn(3, 8), torch.zeros(3))
print(lockin_fast.backends())
assert not {"transformers", "peft", "triton", "matplotlib"} & set(sys.modules)
assert set(lockin_fast.__all__) <= set(dir(lockin_fast))
try:
    lockin_fast.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError("an unknown name was found")
"""


def test_torch_alone_is_enough():
    run = subprocess.run([sys.executable, "-c", TORCH_ALONE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "block_penalty" in run.stdout


def test_importing_the_package_loads_no_op():
    code = "import sys, lockin_fast; assert 'torch' not in sys.modules and 'lockin_fast.ops' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
