"""Several processes under torchrun, on the CPU: they follow the curve of one, and only rank 0 prints and writes."""

import time

import pytest
import torch
from conftest import same, weights

import models

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")  # standalone: a port of its own
LAYERS = """
import os, signal, sys
import torch
import torch.nn.functional as F
import data, distill, models, train_student, train_teacher

def plain(classes):  # without batch normalisation, which each process would do on its own share
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, stride=2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(392, classes))
    network.unused = torch.nn.Parameter(torch.ones(3))
    network.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    return network
"""
GRADIENTS = """
device = models.setup()
train, _ = data.load_train(device)
network = models.new_network(models.student, train, 0).eval()
images, labels, _ = next(data.batches(train, 60, 0, 0))
F.cross_entropy(network(images), labels).backward()
torch.save([parameter.grad for parameter in network.parameters()], f"gradients-{data.RANK}.pt")
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
    torch.save({"state_dict": run.network.state_dict()}, f"{run.name}-{data.RANK}.pt")
    save(run)
    if data.WORLD_SIZE > 1:
        torch.distributed.barrier()  # the next script reads what rank 0 has written
models.Run.save = save_too
"""
ONE_DIES = """
record = models.Run.update
def die(run, *arguments):
    if len(run.curve) == 3 and data.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    record(run, *arguments)
models.Run.update = die
"""


@pytest.fixture
def launch(copy):
    """Runs code in one process, or in two under torchrun."""
    copy.edit("models.py", BFLOAT16=False)

    def launch(code, processes):
        code += "\nmodels.run_script(lambda: None)\n"  # ends as a script does: without it a process may be aborted
        driver = copy.folder.parent / "driver.py"  # it would be a part of the recipe in the folder of the scripts
        driver.write_text(LAYERS + code, encoding="utf-8")
        command = (*TORCHRUN, str(driver)) if processes == 2 else (str(driver),)
        return copy.run(*command)

    return launch


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_follow_the_curve_of_one(copy, launch):
    copy.edit("data.py", HOLD_OUT=20)  # 180 images are left: three batches of two equal shares
    for script in models.SCRIPTS.values():
        copy.edit(script, BATCH_SIZE=60)
    folder, output, made = copy.folder / "checkpoints" / "synthetic", {}, {}
    for processes in (1, 2):
        done = launch(GRADIENTS + EVERY_ONE_SAVES + ALL_THREE, processes)
        assert done.returncode == 0, done.stderr
        output[processes] = done.stdout.splitlines()
        made[processes] = {name: models.load_file(folder / f"{name}.pt", "it") for name in models.SCRIPTS}
        if processes == 1:
            whole = torch.load(copy.folder / "gradients-0.pt")
    assert output[1][0] == "60 images" and output[2][0] == "30 images"
    assert len(output[1]) == len(output[2])  # only rank 0 prints
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
    assert not path.exists() and (path.parent / "student.progress.pt").exists()
    done = launch("train_student.main()", 2)
    assert done.returncode == 0 and "Continuing the unfinished run after epoch 3 of 5." in done.stdout
    assert path.exists() and not (path.parent / "student.progress.pt").exists()


ADAMW = """
models.Muon = lambda network, *_: torch.optim.AdamW(network.parameters(), 1e-3)
train_student.main()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_any_optimizer_trains_all_processes_together(copy, launch):
    copy.edit("train_student.py", BATCH_SIZE=45)  # shares of 20 images
    done = launch(EVERY_ONE_SAVES + ADAMW, 2)
    assert done.returncode == 0, done.stderr
    assert same(*(weights(copy.folder / f"student-{rank}.pt") for rank in (0, 1)))


FAILURES = {
    "an exception in rank 1": "if data.RANK == 1: raise ValueError('lost')",
    "a sentence from rank 0": "if data.RANK == 0: raise SystemExit('One sentence.')",
}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_failure_in_one_rank_ends_all_within_seconds(failure, launch):
    code = f"""
update = models.Run.update
def fail(run, *arguments):
    {failure}
    update(run, *arguments)
models.Run.update = fail
models.run_script(train_student.main)
"""
    started = time.monotonic()
    done = launch(code, 2)
    assert done.returncode != 0 and ("lost" in done.stderr or "One sentence." in done.stderr)
    assert time.monotonic() - started < 60  # the timeout of a collective is an hour


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_one_test_image_for_two_processes(copy, launch):
    copy.edit("data.py", SYNTHETIC_IMAGES={"train": 200, "test": 1})
    assert launch("train_student.main()", 1).returncode == 0
    done = launch("import evaluate; evaluate.main()", 2)
    assert done.returncode == 0, done.stderr
    assert "1 test images of synthetic" in done.stdout
