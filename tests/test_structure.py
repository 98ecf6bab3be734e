"""The parts fit together as a reader expects: imports run one way, and options end in main."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("download_dataset", "train_sam2_proper", "compare_models", "test_my_image")
PARTS = sorted(path.stem for path in (ROOT / "finetuning").glob("*.py") if path.stem != "__init__")
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
    folder = ROOT / "finetuning" if module in PARTS else ROOT
    return ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))


def imports_of(module: str) -> set[str]:
    """Return the project's own modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("finetuning.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "finetuning":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.removeprefix("finetuning."))
    return found & {*SCRIPTS, *PARTS, "sam2_utils"}


def test_imports_run_from_the_scripts_to_the_parts_to_the_helper():
    assert len(PARTS) > 10
    assert imports_of("sam2_utils") == set()
    for module in (*SCRIPTS, *PARTS):
        assert not imports_of(module) & set(SCRIPTS), module


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
