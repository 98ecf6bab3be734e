"""The parts fit together as a reader expects: imports run one way, and options end in main."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finetuning"
SCRIPTS = ("download_dataset", "train_sam2_proper", "compare_models", "test_my_image")
# What each room of finetuning/ may import of the others; all may import sam2_utils.
ALLOWED = {
    "basics": set(),
    "volumes": {"basics"},
    "annotations": {"basics"},
    "sources": {"basics", "volumes", "annotations"},
    "dataset": {"basics"},
    "preparation": {"basics", "sources", "dataset"},
    "segmentation": {"basics"},
    "model": {"basics", "segmentation"},
    "evaluation": {"basics", "segmentation", "model", "dataset"},
    "training_data": {"basics", "segmentation", "model", "dataset"},
    # training draws the demo's data
    "training": {
        "basics",
        "segmentation",
        "model",
        "dataset",
        "evaluation",
        "training_data",
        "preparation",
    },
    "comparison": {"basics", "segmentation", "model", "dataset", "evaluation"},
    "inference": {"basics", "segmentation", "model", "volumes"},
    "export": {"basics", "model"},
}
MOST_MODULES = 12  # of a room, beside its __init__.py
# By their names in the package, like basics.files
PARTS = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)
# The functions that read the command line
READERS = (
    "parse_args",
    "main",
    "choose_defaults",
    "parse_args_with_demo",
    "parse_typed",
    "choose",
    "__call__",
)


def tree_of(module: str) -> ast.Module:
    folder = PACKAGE if module in PARTS else ROOT
    path = folder.joinpath(*module.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(module: str) -> set[str]:
    """Return the project's own modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("finetuning.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = f"{node.module}.".removeprefix("finetuning.")
            found |= {source.rstrip("."), *(source + alias.name for alias in node.names)}
    return found & {*SCRIPTS, *PARTS, "sam2_utils"}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_imports_run_from_the_scripts_to_the_parts_to_the_helper():
    assert len(PARTS) > 10
    assert imports_of("sam2_utils") == set()
    for module in (*SCRIPTS, *PARTS):
        assert not imports_of(module) & set(SCRIPTS), module


def test_rooms_import_only_what_they_may():
    assert imports_of("comparison.report") >= {"basics.language", "evaluation.interval"}
    for module in PARTS:
        needs = {room_of(needed) for needed in imports_of(module) - {"sam2_utils"}}
        others = needs - {room_of(module)}
        assert others <= ALLOWED[room_of(module)], module


def test_rooms_are_small_and_say_what_is_in_them():
    for room in ALLOWED.keys() - {"export"}:
        text = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
        modules = [module.partition(".")[2] for module in PARTS if room_of(module) == room]
        assert 0 < len(modules) <= MOST_MODULES, room
        listed = [line.partition(":")[0].strip() for line in text.splitlines()[2:] if ":" in line]
        assert sorted(listed) == modules, room


def test_no_parts_import_each_other_in_a_circle():
    left = {module: imports_of(module) & set(PARTS) for module in PARTS}
    while left:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


def test_what_the_command_line_says_goes_down_as_plain_values():
    for module in (*SCRIPTS, *PARTS):
        for node in ast.walk(tree_of(module)):
            if not isinstance(node, ast.FunctionDef) or node.name in READERS:
                continue
            for argument in (*node.args.args, *node.args.kwonlyargs):
                annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                assert "Namespace" not in annotation, f"{module}.{node.name}"
                assert argument.arg != "args", f"{module}.{node.name}"
