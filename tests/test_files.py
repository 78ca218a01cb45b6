"""Files, whatever happens while one is written or read: whole or absent, never executed, never believed blindly."""

import json
import sys

import pytest
import torch
from conftest import Hostile, obey_permissions, same, weights

import data
import distill
import models
import train_teacher

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork, signals and limits of a Unix")

# Runs a script again and again in children of one process: each is killed, at a random moment or at a chosen point of
# writing a file; the last one is left alone.
KILLER = """
import os, random, signal, sys, time, json
import torch, data, models, {module}

def child(prepare):
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        prepare()
        try:
            {module}.main()
        finally:
            os._exit(0)
    return pid

def dies_at(name, call, before):
    def prepare():
        real, calls = getattr(os, name), [0]
        def wrapped(*arguments):
            calls[0] += 1
            if calls[0] == call and before:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
        setattr(os, name, wrapped)
    return prepare

os.waitpid(child(lambda: None), 0)
os.rename("checkpoints/synthetic/{name}.pt", "undisturbed.pt")
killed, chance = 0, random.Random(0)
for name in ("fsync", "replace"):
    for before in (True, False):
        for call in (1, 2):
            killed += os.waitpid(child(dies_at(name, call, before)), 0)[1] == signal.SIGKILL
for _ in range(6):
    pid = child(lambda: None)
    time.sleep(chance.uniform(0.05, 0.4))
    os.kill(pid, signal.SIGKILL)
    killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
ended = os.waitpid(child(lambda: None), 0)[1]
print(json.dumps([killed, ended]))
"""


@posix
@pytest.mark.parametrize("name", ["teacher", "student", "distilled"])
def test_killed_at_any_moment_it_ends_in_the_same_weights(name, copy):
    script = models.SCRIPTS[name]
    if name == "distilled":
        assert copy.run("train_teacher.py").returncode == 0
    copy.edit(script, EPOCHS=16)
    folder = copy.folder / "checkpoints" / "synthetic"
    done = copy.run("-O", "-c", KILLER.format(module=script.removesuffix(".py"), name=name))
    assert done.returncode == 0, done.stderr
    killed, ended = json.loads(done.stdout)
    assert killed >= 9 and ended == 0  # eight at a point of writing, and most of the others
    assert same(weights(folder / f"{name}.pt"), weights(copy.folder / "undisturbed.pt"))
    assert not list(folder.glob("*.progress.pt"))


@posix
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(copy):
    path = copy.folder / "checkpoints" / "synthetic" / "student.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"the last run's")
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
    done = copy.run("-O", "-c", f"import resource, train_student; {limit}; train_student.main()")
    assert done.returncode == 1
    assert "student.progress.pt could not be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert path.read_bytes() == b"the last run's"
    assert not list(path.parent.glob("*.tmp")) and not list(path.parent.glob("*progress*"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, where root can be made to obey")
def test_a_source_folder_that_nobody_may_write_in(copy, tmp_path):
    elsewhere = {"CHECKPOINT_DIR": str(tmp_path / "elsewhere"), "before": obey_permissions}
    copy.folder.chmod(0o555)
    try:
        if copy.run("-c", "open('new', 'w')", before=obey_permissions).returncode == 0:
            pytest.skip("here one may write in a folder that is read-only")
        done = copy.run("train_student.py", before=obey_permissions)
        assert done.returncode == 1 and "could not be written" in done.stderr and "CHECKPOINT_DIR" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        done = copy.run("train_student.py", **elsewhere)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "elsewhere" / "synthetic" / "student.pt").exists()
    finally:
        copy.folder.chmod(0o755)


def test_two_runs_at_once_do_not_disturb_each_other(copy):
    copy.edit("distill.py", EPOCHS=8)
    assert copy.run("-c", "import train_teacher, distill; train_teacher.main(); distill.main()").returncode == 0
    folder = copy.folder / "checkpoints" / "synthetic"
    (folder / "distilled.pt").rename(folder / "alone.pt")
    both = [copy.start("distill.py") for _ in range(2)]
    output = [running.communicate(timeout=120) for running in both]
    assert [running.returncode for running in both] == [0, 0], output
    assert same(weights(folder / "distilled.pt"), weights(folder / "alone.pt"))


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "hostile", "foreign"])
def test_damaged_progress_is_not_believed(damage, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_teacher.main()
    distill.main()
    (tiny / "distilled.pt").rename(tmp_path / "before.pt")
    with monkeypatch.context() as patch:
        patch.setattr(models.Run, "save", lambda run: None)  # leaves the progress of the first epoch
        distill.main()
    path = tiny / "distilled.progress.pt"
    if damage == "hostile":
        torch.save({"recipe": Hostile()}, path)
    elif damage == "foreign":
        torch.save({"recipe": {"EPOCHS": 2}}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": path.read_bytes()[:-100]}[damage])
    if damage == "foreign":
        message = "progress.pt is an unfinished run with other constants or code .*, or delete distilled.progress.pt."
    else:
        message = r"progress.pt cannot be read \(\w+\): delete it and run python distill.py again."
    with pytest.raises(SystemExit, match=message):
        distill.main()
    assert not (tmp_path / "executed").exists()
    path.unlink()
    distill.main()
    assert same(weights(tiny / "distilled.pt"), weights(tmp_path / "before.pt"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, where root can be made to obey")
def test_a_checkpoint_that_may_not_be_read_says_so(copy):
    assert copy.run("train_teacher.py").returncode == 0
    path = copy.folder / "checkpoints" / "synthetic" / "teacher.pt"
    path.chmod(0)
    done = copy.run("distill.py", before=obey_permissions)
    path.chmod(0o644)
    assert done.returncode == 1 and "teacher.pt cannot be read (PermissionError): " in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "module, name, value, message",
    [
        (data, "DATASET", None, "^DATASET = .*None' does not exist"),
        (data, "HOLD_OUT", -1, "^HOLD_OUT = -1 in data.py must be a whole number from 0"),
        (data, "HOLD_OUT", 0.5, "^HOLD_OUT = 0.5 in data.py must be a whole number"),
        (data, "SHIFT", 32, "^SHIFT = 32 in data.py must be a whole number from 0 to 31"),
        (data, "SIZE", 15, "^SIZE = 15 in data.py must be a whole number from 16 to 256"),
        (data, "SIZE", 257, "^SIZE = 257 in data.py must be a whole number from 16 to 256"),
        (data, "TRAIN_IMAGES", -1, "^TRAIN_IMAGES = -1 in data.py must be a whole number from 0"),
        (models, "WARM_UP", 1.5, "^WARM_UP = 1.5 in models.py must be a number from 0 to 1"),
        (models, "WARM_UP", -0.1, "^WARM_UP = -0.1 in models.py must be a number from 0 to 1"),
    ],
)
def test_other_constants_are_named_too(module, name, value, message, tiny, monkeypatch):
    monkeypatch.setattr(module, name, value)
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match=message):
        train_teacher.main()


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(file):
        file.write(b"half")
        raise OSError("no space")

    with pytest.raises(
        SystemExit, match="file could not be written \\(no space\\): make room, or change CHECKPOINT_DIR"
    ):
        models.write_atomically(path, fail)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    models.write_atomically(path, lambda file: file.write(b"after"))
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]
