"""tests/seeds.py: its figures against numpy's, and a series that was interrupted or mixes constants."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import seeds
from conftest import run_edited

import data
import distill
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

    results = [json.loads((root / f"seed-{seed}/synthetic/results.json").read_text())["models"] for seed in range(2)]
    assert [row["recipe"]["SEED"] for models in results for row in models.values()] == [0, 0, 0, 1, 1, 1]
    right = {name: 100 * np.array([models[name]["accuracy"] for models in results]) for name in results[0]}
    for name, values in right.items():
        expected = [values.mean(), values.std(ddof=1)]
        assert numbers(message, f"{name:12}")[:2] == pytest.approx(expected, abs=0.006), name  # it prints two digits
    gains = right["distilled"] - right["student"]
    half = 12.71 * gains.std(ddof=1) / 2**0.5  # Student's t of one degree of freedom
    expected = [gains.mean(), gains.mean() - half, gains.mean() + half, *gains]
    assert numbers(message, "accuracy ") == pytest.approx(expected, abs=0.006)
    correct = correct_by_image(root)
    by_image = 100 * (correct["distilled"] - correct["student"]).mean(0)
    half = 1.96 * by_image.std(ddof=1) / 100**0.5
    expected = [gains.mean(), gains.mean() - half, gains.mean() + half]
    assert numbers(message, "pooled accuracy") == pytest.approx(expected, abs=0.006)
    written = json.loads((root / "synthetic.json").read_text())
    assert written["models"]["teacher"]["accuracy"] == [models["teacher"]["accuracy"] for models in results]
    assert written["distilled_minus_student"]["accuracy"]["by_seed"] == pytest.approx(gains.tolist())
    assert written["distilled_minus_student"]["accuracy"]["mean"] == pytest.approx(gains.mean())
    assert written["distilled_minus_student"]["pooled accuracy"]["ci95"] == pytest.approx(expected[1:])
    assert written["seeds"] == [0, 1] and written["split"] == "test"
    gap = (right["teacher"] - right["student"]).mean()
    assert numbers(message, "gap to the teacher") == pytest.approx([gap, 100 * gains.mean() / gap], abs=0.06)
    assert written["gap"] == pytest.approx(gap) and written["gap_closed"] == pytest.approx(gains.mean() / gap)


def correct_by_image(root):
    """Of all networks whether each test image is right: float [seeds, images]."""
    test = data.load_test("cpu")
    correct = {name: [] for name in models.SCRIPTS}
    for seed in range(2):
        for name, rows in correct.items():
            content = models.load_if_there(root / f"seed-{seed}" / "synthetic" / f"{name}.pt")
            network = {"teacher": models.teacher, "student": models.student}[content["network"]](10)
            network.load_state_dict(content["state_dict"])
            logits = models.predict(name, network, test)
            rows.append((logits.argmax(1) == test.labels).double().numpy())
    return {name: np.stack(rows) for name, rows in correct.items()}


def test_with_a_hold_out_no_test_image_is_read(series, tiny, monkeypatch, capsys):
    monkeypatch.setattr(data, "HOLD_OUT", 40)
    monkeypatch.setattr(data, "load_test", data.load_test)  # which the series replaces
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
    seeds.results_of(1, tiny.parent)
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
    monkeypatch.setattr(data, "load_test", data.load_test)  # which the series replaces
    with pytest.raises(SystemExit, match="^Trained with other constants than now, or by another script: .*[.]pt"):
        series()


def test_the_figures_of_another_loss_are_not_printed_again(series, tmp_path, monkeypatch):
    series()
    text = Path(distill.__file__).read_text(encoding="utf-8")
    edited = run_edited(monkeypatch, distill, tmp_path, "soft = F.kl_div(", "soft = 2 * F.kl_div(")
    with pytest.raises(SystemExit, match="by another script: .*seed-0.*distilled.pt, .*seed-1.*distilled.pt. Delete"):
        series()
    edited.write_text(text + "# a comment", encoding="utf-8")
    series()


def test_a_network_that_was_deleted_is_trained_and_evaluated_again(series, tiny):
    series()
    path = tiny.parent / "seed-1" / "synthetic" / "distilled.pt"
    results = path.with_name("results.json")
    before = json.loads(results.read_text())["models"]["distilled"]["recipe"]
    path.unlink()
    results.write_text("{}")
    series()
    assert path.exists() and json.loads(results.read_text())["models"]["distilled"]["recipe"] == before


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
    with pytest.raises(SystemExit, match="results.json is of another teacher"):
        seeds.main()
