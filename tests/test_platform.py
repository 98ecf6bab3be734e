"""The scripts run as commands, on old consoles, from 한글 folders, with spaces in every path."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_pairs

from finetuning.basics.image_files import read_image

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("download_dataset.py", "train_sam2_proper.py", "compare_models.py", "test_my_image.py")


def run_command(script: str, *options: object, encoding: str, folder: Path):
    """Run a script in a process of its own, on a console of the given encoding, on the CPU.

    A notebook's backend for drawing, which is not there, is no obstacle.
    """
    options += ("--device", "cpu") if script != "download_dataset.py" else ()
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, options)],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONIOENCODING": encoding,
            "PYTHONUTF8": "0",
            "MPLBACKEND": "module://matplotlib_inline.not_there",
        },
        capture_output=True,
        timeout=240,
    )


def test_all_four_scripts_run_from_a_hangul_folder_on_old_consoles(tmp_path, random_mini):
    folder = tmp_path / "한글 데이터"
    write_pairs(folder / "내 자료", 5)
    steps = (
        ("cp949", "download_dataset.py", "--images", "내 자료/images", "--masks", "내 자료/masks",
         "--data", "나눈 자료", "--skip-checkpoint"),
        ("ascii", "train_sam2_proper.py", "--data", "나눈 자료", "--model", "mini", "--checkpoint",
         random_mini, "--epochs", 1, "--limit", 2, "--output", "결과"),
        ("cp949", "compare_models.py", "--data", "나눈 자료", "--original", random_mini,
         "--finetuned", "결과/sam2_best.pt", "--figures", 1, "--clicks", 2, "--output", "결과/비교",
         "--language", "en"),
        ("cp949", "test_my_image.py", "--image", "내 자료/images/pair_000.jpg", "--point", "60,40",
         "--checkpoint", "결과/sam2_best.pt", "--output", "결과/내 것"),
    )  # fmt: skip
    for encoding, script, *options in steps:
        done = run_command(script, *options, encoding=encoding, folder=folder)
        assert done.returncode == 0, done.stderr.decode(encoding, "replace")
        assert b"Traceback" not in done.stderr
        text = done.stdout.decode(encoding)  # strictly: nothing outside the console's encoding
        if script == "compare_models.py":
            assert "┌" not in text  # in a Korean code page it may be two columns wide
            assert "|  improvement:" in text and "NoC@85" in text
    assert read_image(folder / "결과/learning_curve.png").ndim == 3
    assert (folder / "결과/내 것/pair_000_001_mask.png").is_file()
    assert len(list((folder / "결과/비교").glob("comparison_*.png"))) == 1


def test_a_mistake_in_a_real_process_is_one_line_and_status_2(tmp_path):
    done = run_command("compare_models.py", "--data", "없음", encoding="ascii", folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.startswith(b"error: ") and done.stderr.strip().count(b"\n") == 0


@pytest.mark.parametrize("script", [*SCRIPTS, "finetuning/export.py"])
def test_another_python_without_the_packages_is_told_what_to_do(script, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(  # -S: without the packages of this Python
        [sys.executable, "-S", ROOT / script, "--help"], env=environment, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: not installed in ") and "torch" in done.stderr
    assert "activate" in done.stderr or "-m pip install -r requirements.txt" in done.stderr


def test_a_missing_library_of_the_system_is_told_with_its_remedy(tmp_path):
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, ROOT / "test_my_image.py", "--help"], env=environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "libGL.so.1" in done.stderr and "opencv-python-headless" in done.stderr


# Ends where torch is first imported; with status 0 where it would fall back to the CPU.
PROBE = """
import os, runpy, sys
class Probe:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.exit(os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK") != "1")
sys.meta_path.insert(0, Probe())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_mps_falls_back_to_the_cpu_before_torch_is_imported(script):
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_ENABLE_MPS_FALLBACK"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, script], cwd=ROOT, env=environment, capture_output=True,
        timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_commands_on_any_console(run_script, script):
    outcome = run_script(importlib.import_module(Path(script).stem).main, "--help")
    assert outcome.status == 0
    assert f"python {script}" in outcome.out  # the commands to copy
    assert "default: " in outcome.out
    assert outcome.out.isascii()
