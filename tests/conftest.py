"""What the tests share: tiny images and networks, through the real code."""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for networks as tiny as these, more threads only wait for each other

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import distill  # noqa: E402
import models  # noqa: E402
import train_student  # noqa: E402
import train_teacher  # noqa: E402


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The scripts on 200 synthetic images, with tiny networks, for two epochs. Returns where the checkpoints go."""
    monkeypatch.setenv("DATASET", "synthetic")
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path))
    monkeypatch.setattr(data, "SYNTHETIC_IMAGES", {"train": 200, "test": 100})
    monkeypatch.setattr(models, "TEACHER_WIDTHS", (6, 8, 12, 16))
    monkeypatch.setattr(models, "STUDENT_WIDTHS", (4, 4, 6, 8))
    monkeypatch.setattr(models, "setup", lambda: torch.device("cpu"))  # where bit-identity is promised
    for script in (train_teacher, train_student, distill):
        monkeypatch.setattr(script, "EPOCHS", 2)
        monkeypatch.setattr(script, "BATCH_SIZE", 32)
    return tmp_path / "synthetic"


class Hostile:
    """Makes a folder named executed where a pickle of it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


class Copy:
    """A copy of the repository whose constants are edited and whose scripts are run as a user does it."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for file in ROOT.glob("*.py"):
            shutil.copy(file, folder)

    def edit(self, file: str, **constants) -> None:
        path = self.folder / file
        text = path.read_text(encoding="utf-8")
        for name, value in constants.items():
            text, count = re.subn(rf"(?m)^{name} = .*$", lambda _: f"{name} = {value!r}", text)
            assert count == 1, f"{file} assigns {name} {count} times at the start of a line"
        path.write_text(text, encoding="utf-8")

    def start(self, *command: str, cwd: Path | None = None, before=None, **environment: str) -> subprocess.Popen:
        """python <script> <arguments>, or python -m, -c ...; before() is called in the new process first."""
        if command[0].endswith(".py"):
            command = (str(self.folder / command[0]), *command[1:])
        unset = ("DATASET", "DATA_DIR", "CHECKPOINT_DIR")
        inherited = {name: value for name, value in os.environ.items() if name not in unset}
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd or self.folder,
            env=inherited | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(self.folder)} | environment,
            preexec_fn=before,
            start_new_session=True,  # so that a run that hangs can be ended with all its processes
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(self, *command: str, **options) -> subprocess.CompletedProcess:
        with self.start(*command, **options) as running:
            try:
                out, error = running.communicate(timeout=200)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(running.args, running.returncode, out, error)


def obey_permissions():
    """Takes from root, where the tests are run by root, the right to read and write where nobody may."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability)  # PR_CAPBSET_DROP: from the next exec on


def run_edited(monkeypatch, module, folder: Path, old: str = "", new: str = "") -> Path:
    """Lets a module pass for a copy of its file in that folder, in which `old` has become `new`. Returns the copy."""
    text, copy = Path(module.__file__).read_text(encoding="utf-8"), folder / Path(module.__file__).name
    assert not old or text.count(old) == 1
    copy.write_text(text.replace(old, new) if old else text, encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(copy))
    return copy


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A user's own module parts/loss.py, loaded from below the folder of the scripts, which are copied for that."""
    root = tmp_path / "scripts"
    (root / "parts").mkdir(parents=True)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, root)
    path = root / "parts" / "loss.py"
    path.write_text("SCALE = 1.0\n", encoding="utf-8")
    monkeypatch.setattr(models, "ROOT", root)
    monkeypatch.setitem(sys.modules, "parts.loss", types.ModuleType("parts.loss"))
    sys.modules["parts.loss"].__file__ = str(path)
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether the weights are bit-identical."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def copy(tmp_path):
    """A copy with tiny images and networks, in a folder whose name has a space."""
    copy = Copy(tmp_path / "a copy")
    copy.edit("data.py", DATASET="synthetic", SYNTHETIC_IMAGES={"train": 200, "test": 100})
    copy.edit("models.py", TEACHER_WIDTHS=(6, 8, 12, 16), STUDENT_WIDTHS=(4, 4, 6, 8))
    for script in ("train_teacher.py", "train_student.py", "distill.py"):
        copy.edit(script, EPOCHS=2, BATCH_SIZE=50)
    return copy


@pytest.fixture
def folder(tmp_path):
    """A folder dataset: three classes, of 12 training and 4 test images each, 40 x 24 pixels."""
    root = tmp_path / "my images"
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for shade, name in ((40, "dark"), (120, "grey"), (200, "light")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.normal(shade, 20, (24, 40, 3)).clip(0, 255).astype(np.uint8)
                to_pil_image(pixels).save(root / split / name / f"{number}.png")
    return root
