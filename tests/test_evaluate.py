"""evaluate.py: the figures against hand calculations, and the comparison."""

import json
import math

import numpy as np
import pytest
import torch
import torchvision
from conftest import run_edited
from torch import nn
from torchvision.transforms.functional import to_pil_image

import data
import distill
import evaluate
import models
import train_student
import train_teacher


def test_paired_difference():
    right = torch.tensor([1, 1, 1, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    before = torch.tensor([1, 0, 1, 0, 0, 1, 1, 1, 0, 0], dtype=torch.bool)
    mean, low, high, differing = evaluate.paired_difference(right, before)  # three gained, one lost
    changes = [100 * (a - b) for a, b in zip(right.tolist(), before.tolist())]
    changes += [100, -100, 0, 0]  # Agresti and Min's, which count a half each
    middle, weights = sum(changes) / 12, [1] * 10 + [0.5] * 4
    variance = sum(weight * (change - middle) ** 2 for change, weight in zip(changes, weights)) / 12
    assert mean == pytest.approx(20)
    assert (low, high) == pytest.approx([middle + sign * 1.96 * math.sqrt(variance / 12) for sign in (-1, 1)])
    assert differing == 4
    mean, low, high, differing = evaluate.paired_difference(right, right)
    assert mean == 0 and low == -high and differing == 0


@pytest.mark.parametrize("count", [9, 50, 10_000])
def test_the_interval_of_the_difference_holds_what_it_promises(count):
    """Over repeated draws it holds the true difference, 10 points, in about 95 cases of 100; never in far fewer."""
    chances, held, generator = [0.2, 0.1, 0.7], 0, np.random.default_rng(0)
    for gained, lost, _ in generator.multinomial(count, chances, 400):
        correct, before = torch.ones(count).bool(), torch.ones(count).bool()
        before[:gained] = False
        correct[gained : gained + lost] = False
        mean, low, high, _ = evaluate.paired_difference(correct, before)
        held += low <= 10 <= high
        if count == 10_000:  # as by the plain formula, to 0.02 points
            difference = 100 * (correct.double() - before.double())
            half = 1.96 * difference.std(correction=0).item() / 100
            assert abs(low - (mean - half)) < 0.02 and abs(high - (mean + half)) < 0.02
    assert 0.93 <= held / 400 <= 0.99


def test_calibration_error_adds_up_what_is_too_high_and_too_low():
    """Two bins whose gaps, +0.1 and -0.1, would cancel each other."""
    shares = torch.tensor([[0.7, 0.3]] * 10 + [[0.9, 0.1]] * 10)
    labels = torch.tensor([0] * 6 + [1] * 4 + [0] * 10)
    assert evaluate.calibration_error(shares.log(), labels) == pytest.approx(0.1, abs=1e-6)


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
    attention, macs = nn.TransformerEncoderLayer(8, 2, 16).eval(), 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    assert evaluate.multiply_accumulates(attention, torch.zeros(5, 1, 8)) == macs
    frozen = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False).eval()  # runs fused
    fused = torch.backends.mha.get_fastpath_enabled()
    assert evaluate.multiply_accumulates(frozen, torch.zeros(1, 5, 8)) == macs
    assert torch.backends.mha.get_fastpath_enabled() == fused
    vit = torchvision.models.VisionTransformer(32, 8, 1, 2, 8, 16, num_classes=3).requires_grad_(False).eval()
    macs = 16 * 3 * 64 * 8 + 17 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 17 * 17 * 8 + 8 * 3
    assert evaluate.multiply_accumulates(vit, torch.zeros(1, 3, 32, 32)) == macs


def without_speed(results):
    for figures in results["models"].values():
        del figures["images_per_second"]
    return results


def test_two_evaluations_are_identical_and_complete(tiny, capsys):
    for script in (train_teacher, train_student, distill):
        script.main()
    path = tiny / "results.json"
    evaluate.main()
    message, first = capsys.readouterr().out, without_speed(json.loads(path.read_text()))
    evaluate.main()
    assert without_speed(json.loads(path.read_text())) == first
    lines = [line for line in message[message.index("test images") :].splitlines() if str(tiny) not in line]
    assert max(map(len, lines)) <= 100, max(lines, key=len)

    assert "images are also among" not in message
    assert first["dataset"] == "synthetic" and first["device"] == "cpu" and first["test_images"] == 100
    models_ = first["models"]
    assert list(models_) == ["teacher", "student", "distilled"]
    assert models_["teacher"]["agreement_with_teacher"] == 1
    test = data.load_test("cpu")
    right, answers = {}, {}
    for name, figures in models_.items():
        network, _ = models.load_checkpoint(name, "synthetic", test)
        right[name] = (models.predict(network, test).argmax(1) == test.labels).sum().item()
        assert figures["accuracy"] == pytest.approx(right[name] / 100)
        logits = models.predict(network, test)
        of_label = logits.double().softmax(1)[torch.arange(100), test.labels]
        assert figures["loss"] == pytest.approx(-of_label.log().mean().item(), rel=1e-5)
        assert figures["ece"] == pytest.approx(evaluate.calibration_error(logits, test.labels))
        assert figures["parameters"] == sum(value.numel() for value in network.parameters())
        assert figures["macs"] == evaluate.multiply_accumulates(network, test.images[:1].permute(0, 3, 1, 2) / 255)
        answers[name] = logits.argmax(1)
        same = (answers[name] == answers["teacher"]).sum().item()  # the teacher comes first
        assert figures["agreement_with_teacher"] == pytest.approx(same / 100)
    assert first["distilled_minus_student"]["points"] == pytest.approx(right["distilled"] - right["student"])
    low, high = first["distilled_minus_student"]["ci95"]
    assert low <= right["distilled"] - right["student"] <= high
    assert (first["gap_closed"] is None) == ("Distillation closed" not in message)
    assert "Not a fair comparison" not in message


def test_missing_checkpoints_are_named_with_their_scripts(tiny, capsys):
    with pytest.raises(SystemExit, match="nothing to evaluate"):
        evaluate.main()
    train_student.main()
    capsys.readouterr()
    evaluate.main()
    message = capsys.readouterr().out
    assert "No teacher checkpoint: run python train_teacher.py." in message
    assert "No distilled checkpoint: run python distill.py." in message
    assert list(json.loads((tiny / "results.json").read_text())["models"]) == ["student"]


def test_recipes_that_differ_are_named(tiny, monkeypatch, capsys):
    train_teacher.main()
    train_student.main()
    monkeypatch.setattr(distill, "LEARNING_RATE", 0.02)
    distill.main()
    evaluate.main()
    expected = f"different LEARNING_RATE ({train_student.LEARNING_RATE}, 0.02), "
    assert expected in capsys.readouterr().out


def test_a_constant_of_the_users_own_is_compared(tiny, monkeypatch, capsys):
    monkeypatch.setattr(train_student, "ALPHA", 0.1, raising=False)
    train_student.main()
    train_teacher.main()
    monkeypatch.setattr(distill, "ALPHA", 5.0, raising=False)
    distill.main()
    evaluate.main()
    assert "different ALPHA (0.1, 5.0)." in capsys.readouterr().out


def adamw(network, *_):
    return torch.optim.AdamW(network.parameters(), 1e-3)


def cosine(optimizer, steps):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def constant(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


@pytest.mark.parametrize("name, value, named", [
    ("Muon", adamw, "optimizer (Muon, AdamW)"),
    ("make_schedule", cosine, "schedule (LambdaLR, CosineAnnealingLR)"),
    ("make_schedule", constant, "lr of group 0 ("),
])  # fmt: skip
def test_another_optimizer_or_schedule_is_no_fair_comparison(name, value, named, tiny, monkeypatch, capsys):
    train_teacher.main()
    train_student.main()
    monkeypatch.setattr(models, name, value)
    distill.main()
    evaluate.main()
    expected = f"Not a fair comparison: student and distilled were trained with different {named}"
    assert expected in capsys.readouterr().out


def sgd(rate):
    return lambda network, *_: torch.optim.SGD(network.parameters(), rate)


def sgd_with_more(rate):
    settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    return lambda network, *_: torch.optim.SGD(network.parameters(), rate, **settings)


@pytest.mark.parametrize("first, second", [(sgd, sgd_with_more), (sgd_with_more, sgd)])
@pytest.mark.parametrize("constant", [None, 1e-3])
def test_every_value_of_the_optimizers_is_compared_both_ways(first, second, constant, tiny, monkeypatch, capsys):
    train_teacher.main()
    monkeypatch.setattr(models, "Muon", first(0.1))
    train_student.main()
    monkeypatch.setattr(models, "Muon", second(0.1))
    if constant:
        monkeypatch.setattr(distill, "WEIGHT_DECAY", constant)  # beside which the optimizer's own values stay named
    distill.main()
    capsys.readouterr()
    evaluate.main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Not a fair comparison")]
    for name in ("momentum", "nesterov", "weight_decay"):
        assert f"{name} of group 0 (" in line
    assert ("WEIGHT_DECAY" in line) == bool(constant) and "lr of group" not in line


def test_a_constant_that_stands_in_one_script_alone_is_named(tiny, monkeypatch, capsys):
    train_teacher.main()
    train_student.main()
    monkeypatch.setattr(distill, "GRAD_CLIP", 1.0, raising=False)
    distill.main()
    evaluate.main()
    assert "were trained with different GRAD_CLIP (absent, 1.0).\n" in capsys.readouterr().out
    monkeypatch.delattr(distill, "GRAD_CLIP")
    distill.main()
    monkeypatch.setattr(models, "TEACHER_WIDTHS", (6, 8, 12, 20))  # of no matter to the student
    train_teacher.main()
    distill.main()
    capsys.readouterr()
    evaluate.main()
    assert "Not a fair comparison" not in capsys.readouterr().out


def test_an_own_module_edited_between_the_trainings_is_named(tiny, own_module, capsys):
    train_teacher.main()
    train_student.main()
    own_module.write_text("SCALE = 2.0\n")
    distill.main()
    evaluate.main()
    message = capsys.readouterr().out
    assert "Perhaps not a fair comparison: parts/loss.py was edited between the two trainings." in message
    assert "data.py was" not in message and "by another" not in message


def test_code_edited_between_the_trainings_is_named(tiny, tmp_path, monkeypatch, capsys):
    train_teacher.main()
    train_student.main()
    run_edited(monkeypatch, data, tmp_path, "(first + epoch) % 2 == 1", "(first + epoch) % 2 == 2")
    distill.main()
    evaluate.main()
    message = capsys.readouterr().out
    assert "Perhaps not a fair comparison: data.py was edited between the two trainings." in message
    assert "models.py was edited" not in message and "by another" not in message


def test_another_distill_py_than_now_is_named(tiny, tmp_path, monkeypatch, capsys):
    train_teacher.main()
    train_student.main()
    run_edited(monkeypatch, distill, tmp_path, 'reduction="batchmean"', 'reduction="sum"')
    distill.main()
    evaluate.main()
    message = capsys.readouterr().out
    assert "distilled.pt was trained by another distill.py than this one." in message
    assert "student.pt was trained by another" not in message and "teacher.pt was trained by another" not in message


def test_a_teacher_trained_since_is_noticed(tiny, monkeypatch, capsys):
    for script in (train_teacher, train_student, distill, evaluate):
        script.main()
    assert "another teacher" not in capsys.readouterr().out
    monkeypatch.setattr(train_teacher, "SEED", 1)
    train_teacher.main()
    evaluate.main()
    assert "distilled from another teacher than teacher.pt: run python distill.py." in capsys.readouterr().out


def test_the_learning_curve_is_kept_over_interruptions(tiny, monkeypatch):
    monkeypatch.setattr(train_student, "EPOCHS", 3)
    monkeypatch.setattr(data, "HOLD_OUT", 40)
    train_student.main()
    undisturbed = models.load_file(tiny / "student.pt", "it")["curve"]
    keys = ["epoch", "loss", "cross_entropy", "accuracy", "hold_out_accuracy", "seconds"]
    assert [list(line) for line in undisturbed] == [keys] * 3 and [line["epoch"] for line in undisturbed] == [1, 2, 3]
    write = models.write_atomically

    def killed(path, content):
        write(path, content)
        if path.name.endswith(".progress.pt"):
            raise KeyboardInterrupt

    monkeypatch.setattr(models, "write_atomically", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_student.main()
    monkeypatch.setattr(models, "write_atomically", write)
    train_student.main()
    evaluate.main()
    curve = json.loads((tiny / "results.json").read_text())["models"]["student"]["curve"]
    seconds = [line.pop("seconds") for line in curve]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert curve == [{key: line[key] for key in keys[:-1]} for line in undisturbed]


def test_test_images_that_were_trained_on_are_counted(tiny, monkeypatch, capsys):
    synthetic = data.synthetic

    def with_copies(split):
        images, labels, classes = synthetic(split)
        if split == "test":
            images[:7] = synthetic("train")[0][40:47]
        return images, labels, classes

    monkeypatch.setattr(data, "synthetic", with_copies)
    train_student.main()
    evaluate.main()
    assert "7 of the test images are also among the training images." in capsys.readouterr().out
    results = json.loads((tiny / "results.json").read_text())
    assert results["models"]["student"]["test_images_trained_on"] == 7


def test_a_hundred_classes(tiny, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 1)):
        for number in range(100):
            folder = tmp_path / "hundred" / part / f"class {number}"
            folder.mkdir(parents=True)
            for image in range(count):
                to_pil_image(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{image}.png")
    monkeypatch.setenv("DATASET", str(tmp_path / "hundred"))
    for script in (train_teacher, train_student, distill, evaluate):
        script.main()
    (path,) = tmp_path.glob("hundred-*/results.json")
    assert json.loads(path.read_text())["test_images"] == 100


def comparison(correct: dict[str, list[int]], recipes=None):
    """compare() for networks of two classes that are right (1) or wrong (0) on each image, all labelled 0."""
    logits = {name: torch.tensor([[float(right), 0.5] for right in row]) for name, row in correct.items()}
    recipes = recipes or {"student": {}, "distilled": {"teacher": "f"}, "teacher": {}}
    figures = {name: {"recipe": recipes[name], "fingerprint": "f"} for name in correct}
    results, sentences = evaluate.compare(figures, logits, torch.zeros(len(correct["student"]), dtype=torch.long))
    return results, " ".join(sentences)


def test_no_share_of_the_gap_where_it_means_nothing():
    clear = {"student": [0] * 40 + [1] * 60, "distilled": [0] * 20 + [1] * 80, "teacher": [0] * 10 + [1] * 90}
    results, message = comparison(clear)
    assert results["gap_closed"] == pytest.approx(20 / 30)
    assert "Distillation closed 67% of the gap of 30.00 points to the teacher." in message
    results, message = comparison(clear | {"distilled": [0] * 39 + [1] * 61})
    assert results["gap_closed"] is None
    assert "Not significant: fewer than ten images differ." in message and "gap" not in message
    few = {"student": [0, 0, 0, 0, 1], "distilled": [1] * 5, "teacher": [1] * 5}  # four of four are not enough
    message = comparison(few)[1]
    assert "Not significant: fewer than ten images differ." in message and comparison(few)[0]["gap_closed"] is None
    assert "The distilled student is significantly worse." in comparison(clear | {"distilled": [0] * 60 + [1] * 40})[1]
    worse = [0] * 60 + [1] * 40
    for change in ({"teacher": [0] * 39 + [1] * 61}, {"teacher": worse}, {"distilled": worse}):
        results, message = comparison(clear | change)
        assert results["gap_closed"] is None and "gap" not in message and "Not significant" not in message


def rows(gained, lost, count):
    """Two networks' rows that differ on so many of the images."""
    both = count - gained - lost
    return [1] * gained + [0] * lost + [1] * both, [0] * gained + [1] * lost + [1] * both


@pytest.mark.parametrize("gained, lost, count, significant", [
    (30, 16, 10_000, True),
    (16, 30, 10_000, True),
    (9, 2, 200, True),
    (29, 17, 10_000, False),
    (9, 0, 200, False),
    (10, 0, 200, True),
])  # fmt: skip
def test_a_difference_is_significant_if_its_interval_leaves_out_0_and_ten_images_differ(
    gained, lost, count, significant
):
    more, fewer = rows(gained, lost, count)
    results, message = comparison({"student": fewer, "distilled": more, "teacher": more})
    low, high = results["distilled_minus_student"]["ci95"]
    assert "p" not in results["distilled_minus_student"]
    assert ("Not significant" not in message) == significant
    assert ("Not significant: fewer than ten images differ." in message) == (gained + lost < 10)
    assert ("Not significant: the interval includes 0." in message) == (low <= 0 <= high and gained + lost >= 10)
    assert (results["gap_closed"] is not None) == (significant and gained > lost)
    assert ("significantly worse" in message) == (significant and gained < lost)
    clear = [0] * 100 + [1] * (count - 100)
    distilled = [0] * 50 + [1] * (count - 50)
    teacher = [1] * gained + [0] * lost + clear[gained + lost :]
    student = [0] * gained + [1] * lost + clear[gained + lost :]
    distilled[: gained + lost] = [1] * (gained + lost)
    results, _ = comparison({"student": student, "distilled": distilled, "teacher": teacher})
    assert (results["gap_closed"] is not None) == (significant and gained > lost)  # the teacher's gap counts too


def test_students_trained_on_other_images_are_no_fair_comparison(tiny, monkeypatch, capsys):
    train_student.main()
    monkeypatch.setattr(data, "SYNTHETIC_IMAGES", {"train": 210, "test": 100})
    train_teacher.main()
    distill.main()
    evaluate.main()
    assert "Not a fair comparison: student and distilled were trained with different images" in capsys.readouterr().out


def test_a_network_that_is_always_right(tiny, monkeypatch):
    train_student.main()
    monkeypatch.setattr(models, "predict", lambda network, test: 9 * torch.eye(10)[test.labels])
    evaluate.main()
    text = (tiny / "results.json").read_text()
    assert json.loads(text)["models"]["student"]["accuracy"] == 1 and "NaN" not in text
