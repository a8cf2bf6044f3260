"""Imports point one way: the order that docs/design.md draws, held against every file."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nvae_tf"

# From the bottom to the top; what stands on one floor does not import its neighbours.
FLOORS = [
    {"version", "architectures"},
    {"io"},
    {"config_keys"},
    {"image_spec"},
    {"config"},
    {"run_folder", "engine", "stateless_random", "data"},
    {"distributions", "checkpoint_files", "checks"},
    {"layers"},
    {"keras_training", "objective", "summary"},
    {"model"},
    {"torch_import"},
    {"training", "evaluation", "compression"},
    {"api"},
    {"tuning", "diagnosis"},
    {"cli"},
]
# Keras gives `compile`, `fit` and `export` to the model itself: the only imports that point upwards.
UPWARDS = {("keras_training.py", "training"), ("keras_training.py", "evaluation")}
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def room(module: str) -> str:
    """What stands on a floor: a file of the package's root, or a folder."""
    return module.split(".")[1] if "." in module else "__init__"


def imports():
    """(file, its room, the room that it imports) of every import, those within functions included."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        importer = inside.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "nvae_tf":
                modules = [f"nvae_tf.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            for module in modules:
                if module.startswith("nvae_tf.") and not module.endswith("__version__"):
                    yield str(inside), importer, room(module)


def test_every_room_has_a_floor():
    rooms = {
        path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")
    }
    assert rooms - {"__init__"} == set(FLOOR)


def test_imports_point_downwards():
    wrong = [
        f"{file} imports {other}"
        for file, importer, other in imports()
        if importer not in (other, "__init__")
        and FLOOR[importer] <= FLOOR[other]
        and (file, other) not in UPWARDS
    ]
    assert not wrong, "\n".join(wrong)
    assert len(list(imports())) > 200


def definitions(path):
    """The functions, classes and methods (``Class.method``) of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            methods = (method for method in node.body if isinstance(method, ast.FunctionDef))
            yield from (f"{node.name}.{method.name}" for method in methods)


def test_the_path_of_an_image_is_what_the_design_page_says():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    route = page.partition("## The path of an image")[2].partition("## The walk")[0]
    stations = re.findall(r"`([a-z_/]+\.py): ([\w.]+)`", route)
    assert len(stations) > 40
    for file, name in stations:
        assert name in definitions(PACKAGE / file), f"{file}: {name}"


def test_the_design_page_names_every_module():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+)`", page.partition("## Every module")[2]))
    for path in PACKAGE.rglob("*.py"):
        if path.stem != "__init__":
            assert path.stem in named, path
