"""Several processes under torchrun, on the CPU: they follow the curve of one, and one of them tells and writes."""

import pytest
import torch
from conftest import same, weights

import models

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2")
LAYERS = """
import os, signal, sys
import torch
import torch.nn.functional as F
import data, distill, models, train_student, train_teacher

def plain(classes, widths=None):  # without batch normalisation, which each process would do on its own share
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, stride=2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(392, classes))
"""
GRADIENTS = """
device = models.best_device()
train, _ = data.load_train(device)
network = models.new_network("student", train, 0).eval()
images, labels, _ = next(data.batches(train, 45, 0, 0))
F.cross_entropy(network(images), labels).backward()
number = data.processes()[0]
torch.save([parameter.grad for parameter in network.parameters()], f"gradients-{number}.pt")
print(len(labels), "images")
"""
ALL_THREE = """
train_student.main()
models.student = models.teacher = plain
train_teacher.main()
distill.main()
"""
EVERY_ONE_SAVES = """
save = models.Run.save
def save_too(run):
    torch.save({"state_dict": run.network.state_dict()}, f"{run.name}-{data.processes()[0]}.pt")
    save(run)
models.Run.save = save_too
"""
ONE_DIES = """
record = models.Run.record
def die(run, *arguments):
    if run.epoch == 3 and data.processes()[0] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    record(run, *arguments)
models.Run.record = die
"""


@pytest.fixture
def launch(copy):
    """Runs code in one process, or in two under torchrun."""
    copy.edit("models.py", BFLOAT16=False)

    def launch(code, processes):
        (copy.folder / "driver.py").write_text(LAYERS + code, encoding="utf-8")
        command = (*TORCHRUN, "driver.py") if processes == 2 else ("driver.py",)
        return copy.run(*command)

    return launch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_follow_the_curve_of_one(copy, launch):
    copy.edit("data.py", HOLD_OUT=21)  # 179 images are left: no batch of 45 is a multiple of two
    folder, told, made = copy.folder / "checkpoints" / "synthetic", {}, {}
    for processes in (1, 2):
        done = launch(GRADIENTS + EVERY_ONE_SAVES + ALL_THREE, processes)
        assert done.returncode == 0, done.stderr
        told[processes] = done.stdout.splitlines()
        made[processes] = {name: models.read(folder / f"{name}.pt") for name in models.SCRIPTS}
        if processes == 1:
            whole = torch.load(copy.folder / "gradients-0.pt")
    assert told[1][0] == "45 images" and told[2][0] == "23 images"
    assert len(told[1]) == len(told[2])  # one of them tells
    for number in (0, 1):
        for shared, one in zip(torch.load(copy.folder / f"gradients-{number}.pt"), whole):
            assert torch.allclose(shared, one, rtol=1e-3, atol=1e-6)
    for name in models.SCRIPTS:
        both = [weights(copy.folder / f"{name}-{number}.pt") for number in (0, 1)]
        assert same(*both) and same(both[0], made[2][name]["state_dict"])  # running statistics included
    for name, near in (("teacher", 1e-3), ("distilled", 1e-3), ("student", 0.1)):
        for one, two in zip(made[1][name]["curve"], made[2][name]["curve"]):
            assert two["loss"] == pytest.approx(one["loss"], rel=near)
            assert two["accuracy"] == pytest.approx(one["accuracy"], abs=0.01 if near < 0.1 else near)
    for name in ("teacher", "distilled"):
        one, two = (made[processes][name]["state_dict"] for processes in (1, 2))
        assert all(torch.allclose(one[key], two[key], atol=1e-3) for key in one)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_where_one_dies_all_end_and_a_new_start_continues(copy, launch):
    copy.edit("train_student.py", EPOCHS=5)
    path = copy.folder / "checkpoints" / "synthetic" / "student.pt"
    assert launch(ONE_DIES + "train_student.main()", 2).returncode != 0
    assert not path.exists() and path.with_name("student.progress.pt").exists()
    done = launch("train_student.main()", 2)
    assert done.returncode == 0 and "Continuing the unfinished run after epoch 3 of 5." in done.stdout
    assert path.exists() and not path.with_name("student.progress.pt").exists()
