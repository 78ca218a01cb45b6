"""evaluate.py: the figures against hand calculations, and the comparison."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import data
import distill
import evaluate
import models
import train_student
import train_teacher


def test_wilson_interval():
    low, high = evaluate.wilson_interval(0.8, 10)  # 8 of 10, from the published formula's two roots
    for bound in (low, high):
        assert (bound - 0.8) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / 10)
    assert 0 <= low < 0.8 < high <= 1
    assert evaluate.wilson_interval(1.0, 100)[1] == pytest.approx(1.0)


def test_paired_difference():
    right = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    before = torch.tensor([1, 0, 1, 0, 0, 1, 1, 1, 0, 0], dtype=torch.bool)
    mean, low, high = evaluate.paired_difference(right, before)
    changes = [100 * (a - b) for a, b in zip(right.tolist(), before.tolist())]  # three gained, one lost
    variance = sum((change - 20) ** 2 for change in changes) / 10
    assert mean == pytest.approx(20)
    assert (high - mean, mean - low) == pytest.approx([1.96 * math.sqrt(variance / 10)] * 2)
    assert evaluate.paired_difference(right, right) == (0, 0, 0)


def test_calibration_error_against_a_naive_loop():
    logits = 2 * torch.randn(500, 4, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(500) % 4
    bins = [[] for _ in range(15)]
    for row, label in zip(logits.softmax(1).tolist(), labels.tolist()):
        confidence = max(row)
        bins[min(14, math.ceil(confidence * 15) - 1)].append((confidence, row.index(confidence) == label))
    expected = sum(abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in bins) / 500
    assert evaluate.calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)


def test_multiply_accumulates_by_hand():
    macs = 3 * 24 * 4 * 31 * 31
    macs += 9 * (24 * 5 * 31 * 31 + 5 * 5 * 15 * 15) + 9 * (5 * 6 * 15 * 15 + 6 * 6 * 7 * 7)
    macs += 6 * 10
    assert evaluate.multiply_accumulates(models.ConvNet(10, (24, 5, 6)).eval(), torch.zeros(1, 3, 32, 32)) == macs


def without_speed(results):
    for figures in results["models"].values():
        del figures["images_per_second"]
    return results


def test_two_evaluations_are_identical_and_complete(tiny, capsys):
    for script in (train_teacher, train_student, distill):
        script.main()
    path = tiny / "results.json"
    evaluate.main()
    told, first = capsys.readouterr().out, without_speed(json.loads(path.read_text()))
    evaluate.main()
    assert without_speed(json.loads(path.read_text())) == first
    assert max(map(len, told[told.index("test images") :].splitlines()[:-1])) <= 100

    assert first["dataset"] == "synthetic" and first["device"] == "cpu" and first["test_images"] == 100
    models_ = first["models"]
    assert list(models_) == ["teacher", "student", "distilled"]
    assert models_["teacher"]["agreement_with_teacher"] == 1
    test = data.load_test("cpu")
    train, _ = data.load_train("cpu")
    test.mean, test.std = train.mean, train.std  # what the networks were trained with
    right = {}
    for name, figures in models_.items():
        network, _ = models.load_checkpoint(name, "synthetic", test.classes, torch.device("cpu"))
        right[name] = (models.predict(network, test).argmax(1) == test.labels).sum().item()
        assert figures["accuracy"] == pytest.approx(right[name] / 100)
    assert first["distilled_minus_student"]["points"] == pytest.approx(right["distilled"] - right["student"])
    low, high = first["distilled_minus_student"]["ci95"]
    assert low <= right["distilled"] - right["student"] <= high
    if right["teacher"] > right["student"]:
        share = (right["distilled"] - right["student"]) / (right["teacher"] - right["student"])
        assert first["gap_closed"] == pytest.approx(share)
        assert "Distillation closed" in told
    else:
        assert first["gap_closed"] is None
    assert "Not a fair comparison" not in told


def test_missing_checkpoints_are_named_with_their_scripts(tiny, capsys):
    with pytest.raises(SystemExit, match="nothing to evaluate"):
        evaluate.main()
    train_student.main()
    capsys.readouterr()
    evaluate.main()
    told = capsys.readouterr().out
    assert "no teacher yet: python train_teacher.py" in told and "no distilled yet: python distill.py" in told
    assert list(json.loads((tiny / "results.json").read_text())["models"]) == ["student"]


def test_recipes_that_differ_are_named(tiny, monkeypatch, capsys):
    train_teacher.main()
    train_student.main()
    monkeypatch.setattr(distill, "LEARNING_RATE", 0.02)
    distill.main()
    evaluate.main()
    expected = f"different LEARNING_RATE ({train_student.LEARNING_RATE} and 0.02)."
    assert expected in capsys.readouterr().out


def test_a_teacher_trained_since_is_noticed(tiny, monkeypatch, capsys):
    for script in (train_teacher, train_student, distill, evaluate):
        script.main()
    assert "another teacher" not in capsys.readouterr().out
    monkeypatch.setattr(train_teacher, "SEED", 1)
    train_teacher.main()
    evaluate.main()
    assert "taught by another teacher than teacher.pt" in capsys.readouterr().out


def test_reliability_and_classes_by_hand():
    logits = torch.tensor([[0.0, 4.0, 0.0], [0.0, 4.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 2])
    confidence, right, share = evaluate.reliability(logits, labels)
    sure = math.exp(4) / (math.exp(4) + 2)  # 0.965, in the last bin: one right, one wrong
    assert (share * 4).tolist() == [0] * 6 + [1, 0, 1] + [0] * 5 + [2]  # 0.45 and 0.58, and two above 14/15
    assert confidence[-1].item() == pytest.approx(sure) and right[-1].item() == 0.5 and share[-1].item() == 0.5
    assert evaluate.class_accuracies(logits, labels, ("a", "b", "c", "none")) == {"a": 0.5, "b": 1.0, "c": 0.0}


def test_the_learning_curve_is_kept_over_interruptions(tiny, monkeypatch):
    monkeypatch.setattr(train_student, "EPOCHS", 3)
    monkeypatch.setattr(data, "HOLD_OUT", 40)
    train_student.main()
    undisturbed = (tiny / "student.csv").read_text().splitlines()
    assert undisturbed[0] == "epoch,loss,accuracy,hold_out_accuracy,seconds"
    assert [line.split(",")[0] for line in undisturbed[1:]] == ["1", "2", "3"]
    save = models.save

    def killed(path, content):
        save(path, content)
        if path.name == "student.progress.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(models, "save", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_student.main()
    monkeypatch.setattr(models, "save", save)
    train_student.main()
    again = (tiny / "student.csv").read_text().splitlines()
    assert [line.rsplit(",", 1)[0] for line in again] == [line.rsplit(",", 1)[0] for line in undisturbed]
    curve = models.read(tiny / "student.pt")["curve"]
    assert [str(line["hold_out_accuracy"]) for line in curve] == [line.split(",")[3] for line in again[1:]]


def test_without_matplotlib_one_line_says_how_to_get_pictures(tiny, monkeypatch, capsys):
    train_student.main()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluate.main()
    assert "pip install matplotlib" in capsys.readouterr().out and not (tiny / "results.png").exists()


def test_the_pictures_show_the_figures(tiny, capsys):
    figure = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib").Figure
    drawn = []
    init = figure.__init__

    def spy(self, *arguments, **options):
        init(self, *arguments, **options)
        drawn.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "__init__", spy)
        for script in (train_teacher, train_student, distill, evaluate):
            script.main()
    results = json.loads((tiny / "results.json").read_text())
    assert (tiny / "results.png").read_bytes().startswith(b"\x89PNG")
    sizes, learning, calibration, classes = drawn[0].axes
    rows = results["models"].values()
    assert [bar[0].get_ydata()[0] for bar in sizes.containers] == [100 * row["accuracy"] for row in rows]
    assert [len(line.get_xdata()) for line in learning.get_lines()[::2]] == [2, 2, 2]
    assert len(calibration.get_lines()) == 4
    before, after = (results["models"][name]["class_accuracy"] for name in ("student", "distilled"))
    assert sorted(bar.get_width() for bar in classes.patches) == sorted(100 * (after[n] - before[n]) for n in before)


def test_a_hundred_classes(tiny, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 1)):
        for number in range(100):
            folder = tmp_path / "hundred" / part / f"class {number}"
            folder.mkdir(parents=True)
            for image in range(count):
                to_pil_image(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{image}.png")
    monkeypatch.setenv("DATASET", str(tmp_path / "hundred"))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    for script in (train_teacher, train_student, distill, evaluate):
        script.main()
    results = json.loads((tmp_path / "hundred" / "results.json").read_text())
    assert len(results["models"]["distilled"]["class_accuracy"]) == 100 and results["test_images"] == 100
