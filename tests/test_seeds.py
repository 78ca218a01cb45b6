"""tests/seeds.py: its figures against numpy's, and a series that was interrupted or mixes constants."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import seeds
import torch
from conftest import run_edited

import data
import distill
import evaluate
import models
import train_student
import train_teacher


def numbers(lines, start):
    """Those in the last line with that start; those before it are evaluate.py's."""
    line = next(line for line in reversed(lines) if line.startswith(start))
    return [float(number) for number in re.findall(r"(?<!\d)[+-]?\d+\.\d+", line)]


@pytest.fixture
def series(tiny, monkeypatch):
    """Two seeds of the tiny networks. Returns a function that runs the series."""
    monkeypatch.setattr(seeds, "SEEDS", range(2))
    for script in (train_teacher, train_student, distill):
        monkeypatch.setattr(script, "SEED", 0)  # which the series changes

    def run():
        monkeypatch.setenv("CHECKPOINT_DIR", str(tiny.parent))  # which the series changes too
        seeds.main()

    return run


def test_an_interrupted_series_goes_on_and_its_figures_are_right(series, tiny, monkeypatch, capsys):
    student, root = train_student.main, tiny.parent

    def interrupted():
        if train_student.SEED == 1:
            raise KeyboardInterrupt
        student()

    with monkeypatch.context() as patch:
        patch.setattr(train_student, "main", interrupted)
        with pytest.raises(KeyboardInterrupt):
            series()
    made = {path: path.stat().st_mtime_ns for path in root.glob("seed-*/synthetic/*.pt")}
    assert sorted(path.name for path in made) == ["distilled.pt", "student.pt", "teacher.pt", "teacher.pt"]
    capsys.readouterr()
    series()
    message = capsys.readouterr().out.splitlines()
    assert made == {path: path.stat().st_mtime_ns for path in made}, "what was finished has been trained again"

    paths = [root / f"seed-{seed}/synthetic/{name}.pt" for seed in range(2) for name in models.SCRIPTS]
    assert [models.load_file(path, "it")["recipe"]["SEED"] for path in paths] == [0, 0, 0, 1, 1, 1]
    assert not list(root.glob("seed-*/synthetic/results.json"))  # nothing is read back
    correct = correct_by_image(root)
    right = {name: 100 * rows.mean(1) for name, rows in correct.items()}
    for name, values in right.items():
        expected = [values.mean(), values.std(ddof=1)]
        assert numbers(message, f"{name:12}")[:2] == pytest.approx(expected, abs=0.006), name  # it prints two digits
    gains = right["distilled"] - right["student"]
    half = 12.71 * gains.std(ddof=1) / 2**0.5  # Student's t of one degree of freedom
    expected = [gains.mean(), gains.mean() - half, gains.mean() + half, *gains]
    assert numbers(message, "accuracy ") == pytest.approx(expected, abs=0.006)
    by_image = 100 * (correct["distilled"] - correct["student"]).mean(0)
    half = 1.96 * by_image.std(ddof=1) / 100**0.5
    expected = [gains.mean(), gains.mean() - half, gains.mean() + half]
    assert numbers(message, "pooled accuracy") == pytest.approx(expected, abs=0.006)
    written = json.loads((root / "synthetic.json").read_text())
    assert written["models"]["teacher"]["accuracy"] == pytest.approx(right["teacher"] / 100)
    assert written["distilled_minus_student"]["accuracy"]["by_seed"] == pytest.approx(gains.tolist())
    assert written["distilled_minus_student"]["accuracy"]["mean"] == pytest.approx(gains.mean())
    assert written["distilled_minus_student"]["pooled accuracy"]["ci95"] == pytest.approx(expected[1:])
    assert written["seeds"] == [0, 1] and written["split"] == "test"
    gap = (right["teacher"] - right["student"]).mean()
    closed = gains.mean() / gap if gap > 0 else None
    printed = [gap] if closed is None else [gap, 100 * closed]
    assert numbers(message, "gap to the teacher") == pytest.approx(printed, abs=0.06)
    assert written["gap"] == pytest.approx(gap)
    assert written["gap_closed"] == (None if closed is None else pytest.approx(closed))


def correct_by_image(root):
    """Of all networks whether each test image is right: float [seeds, images]."""
    test = data.load_test("cpu")
    correct = {name: [] for name in models.SCRIPTS}
    for seed in range(2):
        for name, rows in correct.items():
            content = models.load_file(root / f"seed-{seed}" / "synthetic" / f"{name}.pt", "it")
            network = {"teacher": models.teacher, "student": models.student}[content["network"]](10)
            network.load_state_dict(content["state_dict"])
            logits = models.predict(network, test)
            rows.append((logits.argmax(1) == test.labels).double().numpy())
    return {name: np.stack(rows) for name, rows in correct.items()}


def test_with_a_hold_out_no_test_image_is_read(series, tiny, monkeypatch, capsys):
    monkeypatch.setattr(data, "HOLD_OUT", 40)
    drawn, synthetic = [], data.synthetic
    monkeypatch.setattr(data, "synthetic", lambda split: drawn.append(split) or synthetic(split))
    series()
    assert set(drawn) == {"train"}
    assert "synthetic, 40 hold-out images, 2 seeds" in capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 11])
def test_too_few_or_too_many_seeds_are_named(count, series, monkeypatch):
    monkeypatch.setattr(seeds, "SEEDS", range(count))
    with pytest.raises(SystemExit, match=f"SEEDS in tests/seeds.py must be from 2 to 10 seeds, not {count}."):
        series()


def test_a_series_under_torchrun_is_refused(series, monkeypatch):
    monkeypatch.setattr(data, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit, match="^tests/seeds.py runs as one process"):
        series()


def test_a_series_of_other_constants_is_not_mixed_in(series, tiny, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_DIR", str(tiny.parent / "seed-1"))
    for script in (train_teacher, train_student, distill):
        monkeypatch.setattr(script, "SEED", 1)
        script.main()
    monkeypatch.setattr(distill, "KD_WEIGHT", 0.5)
    with pytest.raises(SystemExit) as refused:
        series()  # seed 0 with the new weight, seed 1 with the old one
    assert str(refused.value) == (
        "Trained with other constants than now, or by another script: "
        f"{tiny.parent / 'seed-1' / 'synthetic' / 'distilled.pt'}. "
        "Delete them, and the distilled.pt of each teacher.pt among them, or name another CHECKPOINT_DIR."
    )


def test_the_figures_of_other_constants_are_not_printed_again(series, monkeypatch):
    series()
    monkeypatch.setattr(train_student, "EPOCHS", train_student.EPOCHS + 1)
    with pytest.raises(SystemExit, match="^Trained with other constants than now, or by another script: .*[.]pt"):
        series()


@pytest.mark.parametrize(
    "module, name, value, message",
    [
        (data, "SYNTHETIC_IMAGES", {"train": 180, "test": 100}, "were trained on other images than there are now"),
        (models, "STUDENT_WIDTHS", (4, 4, 6, 6), "makes another network than .*seed-0.*student.pt holds"),
    ],
)
def test_networks_of_other_images_or_layers_are_not_mixed_in(module, name, value, message, series, monkeypatch):
    series()
    monkeypatch.setattr(seeds, "SEEDS", range(3))
    monkeypatch.setattr(module, name, value)
    with pytest.raises(SystemExit, match=message):
        series()


def test_figures_of_test_images_are_not_printed_as_those_of_a_hold_out(series, monkeypatch):
    series()
    monkeypatch.setattr(data, "HOLD_OUT", 40)
    with pytest.raises(SystemExit, match="^Trained with other constants than now, or by another script: .*[.]pt"):
        series()


def test_the_figures_of_another_loss_are_not_printed_again(series, tmp_path, monkeypatch):
    series()
    text = Path(distill.__file__).read_text(encoding="utf-8")
    edited = run_edited(monkeypatch, distill, tmp_path, "soft = F.kl_div(", "soft = 2 * F.kl_div(")
    with pytest.raises(SystemExit, match="by another script: .*seed-0.*distilled.pt, .*seed-1.*distilled.pt. Delete"):
        series()
    edited.write_text(text, encoding="utf-8")
    series()


def numbers_of(capsys, *starts):
    lines = capsys.readouterr().out.splitlines()
    return [numbers(lines, start) for start in starts]


def test_the_figures_are_of_what_lies_there_now(series, tiny, monkeypatch, capsys):
    """Networks that were trained by hand since, and test labels that were corrected."""
    series()
    before = numbers_of(capsys, "loss ", "pooled loss")
    for seed in range(2):  # as students from the labels are
        folder = tiny.parent / f"seed-{seed}" / "synthetic"
        student = models.load_file(folder / "student.pt", "it")
        distilled = models.load_file(folder / "distilled.pt", "it")
        torch.save(distilled | {key: student[key] for key in ("state_dict", "answers")}, folder / "distilled.pt")
    series()
    (mean, *_), (pooled, *_) = numbers_of(capsys, "loss ", "pooled loss")
    assert mean == pooled == 0 and 0 != before[0][0] == pytest.approx(before[1][0], abs=2e-4)
    images, labels, classes = data.synthetic("test")
    test = data.load_test("cpu")
    network, _ = models.load_checkpoint("student", "synthetic", test)  # of the last seed
    labels = models.predict(network, test).argmax(1).numpy()
    drawn = data.synthetic
    corrected = lambda split: (images, labels, classes) if split == "test" else drawn(split)  # noqa: E731
    monkeypatch.setattr(data, "synthetic", corrected)
    series()
    assert json.loads((tiny.parent / "synthetic.json").read_text())["models"]["student"]["accuracy"][1] == 1


def test_a_hold_out_and_test_images_are_not_mixed(series, tiny, monkeypatch, capsys):
    monkeypatch.setattr(data, "HOLD_OUT", 40)
    series()
    before = capsys.readouterr().out.split("hold-out images")[1]
    monkeypatch.setenv("CHECKPOINT_DIR", str(tiny.parent / "seed-0"))
    evaluate.main()  # by hand, on the test images
    capsys.readouterr()
    series()
    assert capsys.readouterr().out.split("hold-out images")[1] == before


@pytest.mark.parametrize("right", [{"teacher"}, {"teacher", "student", "distilled"}, {"student", "distilled"}])
def test_no_share_of_the_gap_where_the_teacher_is_not_better(right, series, tiny, monkeypatch, capsys):
    def load(name, *rest, whole=models.load_checkpoint):
        network, checkpoint = whole(name, *rest)
        network.is_right = name in right
        return network, checkpoint

    def predict(network, split, mirror=False, whole=models.predict):
        logits = whole(network, split, mirror)
        return 9 * torch.eye(10)[split.labels] if network.is_right and len(split) == 100 else logits

    monkeypatch.setattr(models, "load_checkpoint", load)
    monkeypatch.setattr(models, "predict", predict)
    series()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gap to the teacher")]
    assert ("closed" in line) == (right == {"teacher"})
    closed = json.loads((tiny.parent / "synthetic.json").read_text())["gap_closed"]
    assert (closed is not None) == (right == {"teacher"})


def test_a_damaged_network_is_named_with_its_path(series, tiny):
    series()
    path = tiny.parent / "seed-1" / "synthetic" / "student.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SystemExit, match=f"{re.escape(str(path))} cannot be read"):
        series()
    path.unlink()
    series()


def test_against_is_looked_at_before_anything_is_trained(series, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(seeds, "AGAINST", "~/missing")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "home" / "missing" / "seed-0" / "synthetic" / "distilled.pt"
    with pytest.raises(SystemExit, match=re.escape(f"There is no {path} (AGAINST in tests/seeds.py)")):
        series()
    assert "epoch" not in capsys.readouterr().out
    monkeypatch.setattr(seeds, "AGAINST", "elsewhere")  # as CHECKPOINT_DIR, beside data.py
    path = Path(data.__file__).parent / "elsewhere" / "seed-0" / "synthetic" / "distilled.pt"
    with pytest.raises(SystemExit, match=re.escape(f"There is no {path} ")):
        series()


def test_an_edit_of_the_shared_code_is_mentioned(series, tmp_path, monkeypatch, capsys):
    series()
    edited = run_edited(monkeypatch, data, tmp_path)
    edited.write_text(edited.read_text(encoding="utf-8") + "print()\n", encoding="utf-8")
    capsys.readouterr()
    series()
    assert capsys.readouterr().out.startswith("data.py was edited since some of these networks were trained.")


def test_two_ways_to_distil_are_compared(series, tiny, tmp_path, monkeypatch, capsys):
    series()
    root, other = tiny.parent, tmp_path / "other"
    before = json.loads((root / "synthetic.json").read_text())["models"]
    for seed in range(2):
        folder = other / f"seed-{seed}" / "synthetic"
        folder.mkdir(parents=True)
        shutil.copy(root / f"seed-{seed}" / "synthetic" / "teacher.pt", folder)
    monkeypatch.setattr(distill, "KD_WEIGHT", 0.2)
    monkeypatch.setattr(seeds, "AGAINST", str(root))
    monkeypatch.setenv("CHECKPOINT_DIR", str(other))
    capsys.readouterr()
    seeds.main()
    message, written = capsys.readouterr().out, json.loads((other / "synthetic.json").read_text())
    assert not list(other.glob("*/*/student.pt"))
    assert f"student: the distilled one in {root}" in message
    assert written["models"]["student"] == before["distilled"] and written["models"]["teacher"] == before["teacher"]
    right = [100 * np.array(written["models"][name]["accuracy"]) for name in ("distilled", "student")]
    gains = written["distilled_minus_student"]
    assert gains["accuracy"]["by_seed"] == pytest.approx(right[0] - right[1])
    assert gains["pooled accuracy"]["mean"] == pytest.approx((right[0] - right[1]).mean(), abs=1e-6)
    monkeypatch.setattr(train_teacher, "EPOCHS", 1)
    (other / "seed-1" / "synthetic" / "teacher.pt").unlink()
    (other / "seed-0" / "synthetic" / "teacher.pt").unlink()
    monkeypatch.setenv("CHECKPOINT_DIR", str(other))
    with pytest.raises(SystemExit, match="There is no .*seed-0/synthetic/teacher.pt: copy the teachers of AGAINST"):
        seeds.main()
    monkeypatch.setattr(train_teacher, "EPOCHS", 2)
    for seed in range(2):  # another one
        monkeypatch.setenv("CHECKPOINT_DIR", str(other / f"seed-{seed}"))
        monkeypatch.setattr(train_teacher, "SEED", seed + 5)
        train_teacher.main()
    monkeypatch.setenv("CHECKPOINT_DIR", str(other))
    with pytest.raises(SystemExit, match="seed-0/synthetic/teacher.pt is another teacher than that of the distilled"):
        seeds.main()
