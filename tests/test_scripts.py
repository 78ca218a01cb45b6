"""The scripts as a user runs them: in a copy, in sequence, with constants edited at the top of the files."""

import ast
import functools
import json
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, Copy

import models

SEQUENCE = ("train_teacher.py", "train_student.py", "distill.py", "evaluate.py")


def test_the_sequence(copy):
    copy.edit("distill.py", TEMPERATURE=2.0, KD_WEIGHT=0.5)
    for script in SEQUENCE:
        done = copy.run(script)
        assert done.returncode == 0, done.stderr
    results = json.loads((copy.folder / "checkpoints" / "synthetic" / "results.json").read_text())
    assert list(results["models"]) == ["teacher", "student", "distilled"]
    assert "distilled - student:" in done.stdout and "\x1b" not in done.stdout
    made = sorted(path.name for path in (copy.folder / "checkpoints" / "synthetic").iterdir())
    assert set(made) - {"results.png"} == {"distilled.pt", "results.json", "student.pt", "teacher.pt"}


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_a_run_that_is_interrupted_says_how_to_go_on_and_goes_on(copy):
    copy.edit("train_student.py", EPOCHS=40)
    checkpoint = copy.folder / "checkpoints" / "synthetic" / "student.pt"
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    running = copy.start("train_student.py", before=heard)
    for _ in range(4):  # what it trains, and three of the epochs
        assert running.stdout.readline(), running.stderr.read()
    running.send_signal(signal.SIGINT)
    _, message = running.communicate(timeout=60)
    assert running.returncode != 0 and not checkpoint.exists() and "Traceback" not in message
    assert message == "\nInterrupted. To go on, run the same command again.\n"
    done = copy.run("train_student.py")
    assert done.returncode == 0 and done.stdout.startswith("Continuing the unfinished run after epoch")
    assert checkpoint.exists() and not list(checkpoint.parent.glob("*progress*"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.parametrize("where", ["data.load_train", "models.predict"])
def test_an_interruption_before_the_first_epoch_is_one_sentence(where, copy):
    """While the images are loaded, and while the teacher answers."""
    assert copy.run("train_teacher.py").returncode == 0
    interrupt = f"def interrupted(*_, **__): os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\n{where} = interrupted"
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background jobs ignore it
    code = f"import data, distill, models, os, signal, time\n{interrupt}\n{heard}\nmodels.run_script(distill.main)"
    done = copy.run("-c", code)
    assert done.returncode == 130
    assert done.stderr == "\nInterrupted. To go on, run the same command again.\n"


def test_the_output_without_a_terminal_is_one_plain_line_an_epoch(copy):
    copy.edit("data.py", HOLD_OUT=40)
    done = copy.run("train_student.py")
    lines = done.stdout.splitlines()
    assert done.stderr == "" and "\r" not in done.stdout
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 2 and len(lines) == 4
    assert re.search(r", about \d+\.\d min left$", epochs[0]) and "left" not in epochs[1]
    assert all("cross-entropy" in line for line in epochs)
    assert all("loss" in line and "accuracy" in line and "hold-out" in line and "images/s" in line for line in epochs)


def test_a_folder_of_images_from_another_working_directory(copy, folder, tmp_path):
    for script in ("train_student.py", "evaluate.py"):
        done = copy.run(script, cwd=tmp_path, DATASET="my images", CHECKPOINT_DIR="elsewhere")
        assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "elsewhere").glob("my images-*/results.json")
    results = json.loads(path.read_text())
    assert results["dataset"] == path.parent.name and results["test_images"] == 12
    assert not (copy.folder / "checkpoints").exists() and not (copy.folder / "data").exists()


def test_a_console_without_the_letters_of_a_folders_name(copy, folder):
    folder = folder.rename(folder.with_name("日本"))
    done = copy.run("train_student.py", DATASET=str(folder), PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "36 images of \\u65e5\\u672c" in done.stdout
    assert list((copy.folder / "checkpoints").glob("日本-*/student.pt"))


def test_a_users_error_is_one_sentence(tmp_path):
    cases = [
        ("distill.py", {}, "teacher.pt: run python train_teacher.py first."),
        ("evaluate.py", {}, "There is nothing to evaluate in"),
        ("train_student.py", {"EPOCHS": -3}, "EPOCHS = -3 in train_student.py must be a whole number from 1 to inf."),
        ("distill.py", {"KD_WEIGHT": 2}, "KD_WEIGHT = 2 in distill.py must be a number from 0 to 1."),
        ("train_teacher.py", {"DATASET": "nowhere"}, "nowhere' does not exist."),
    ]
    running = []
    for number, (script, edits, _) in enumerate(cases):
        copy = Copy(tmp_path / str(number))
        copy.edit("data.py", DATASET="synthetic")
        for name, value in edits.items():
            copy.edit("data.py" if name == "DATASET" else script, **{name: value})
        running.append(copy.start(script))
    for (*_, expected), started in zip(cases, running):
        _, message = started.communicate(timeout=200)
        assert started.returncode == 1
        assert expected in message and "Traceback" not in message and len(message.splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.parametrize("script", ["seeds", "draw"])
def test_the_tools_end_as_the_scripts_do(script, copy):
    if script == "draw":
        pytest.importorskip("matplotlib")
    interrupt = "def interrupted(): os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\nmodels.setup = interrupted"
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background jobs ignore it
    path = str(ROOT / "tests" / f"{script}.py")
    code = f"import models, os, runpy, signal, sys, time\n{interrupt}\n{heard}\nsys.argv = [{path!r}]\n"
    done = copy.run("-c", code + f"runpy.run_path({path!r}, run_name='__main__')")
    assert done.returncode == 130 and done.stderr == "\nInterrupted. To go on, run the same command again.\n"


def test_arguments_are_refused(copy):
    for argument in ("--help", "--epochs"):
        done = copy.run("train_student.py", argument, "3")
        said = f"train_student.py takes no arguments ({argument}): edit the constants at the top of the file.\n"
        assert done.returncode == 1 and done.stdout == "" and done.stderr == said


def test_a_script_is_profiled_from_another_folder(copy):
    name = copy.folder.name
    done = copy.run("-m", "cProfile", f"{name}/train_student.py", cwd=copy.folder.parent)
    assert done.returncode == 0, done.stderr
    recipe = models.load_file(copy.folder / "checkpoints" / "synthetic" / "student.pt", "it")["recipe"]
    assert {key for key in recipe if ".py" in key} == {"train_student.py", "data.py", "models.py"}


def test_a_script_from_standard_input_is_told_how_to_run_it(copy):
    code = (copy.folder / "train_student.py").read_text(encoding="utf-8")
    done = copy.run("-c", f"import sys; exec({code!r})")
    assert done.returncode == 1 and done.stderr.startswith("Run a script as a file, as in python distill.py")


def test_importing_does_no_work(tmp_path):
    code = (
        "import torch; before = torch.get_rng_state()\n"
        "import data, models, train_teacher, train_student, distill, evaluate\n"
        "assert torch.equal(before, torch.get_rng_state())\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_constant_is_assigned_once_at_column_0_with_a_reason():
    shared = ["SEED", "EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "WEIGHT_DECAY"]
    for file, names in {
        "data.py": ["DATASET", "DATA_DIR", "HOLD_OUT", "TRAIN_IMAGES", "SIZE", "MIRROR"],
        "models.py": ["CHECKPOINT_DIR", "TEACHER_WIDTHS", "STUDENT_WIDTHS"],
        "train_teacher.py": shared,
        "train_student.py": shared,
        "distill.py": [*shared, "TEMPERATURE", "KD_WEIGHT", "UNLABELLED"],
    }.items():
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        for name in names:
            (line,) = [line for line in lines if line.startswith(f"{name} = ")]
            value, reason = line.removeprefix(f"{name} = ").split("  # ")
            ast.literal_eval(value)
            assert reason


def test_only_the_packages_of_the_requirements_are_imported():
    """And Pillow, which torchvision brings along."""
    required = {"PIL"} | {line.split(">=")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    own = {path.stem for path in ROOT.glob("*.py")}
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in required | own | set(sys.stdlib_module_names), f"{path.name}: {name}"
