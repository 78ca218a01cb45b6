"""distill.py: the loss, the teacher, its answers."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import same, weights

import data
import distill
import models
import train_student
import train_teacher


def loss_by_hand(student, teacher, labels, temperature, weight):
    """The loss and its gradient from the definition, in plain Python floats (float64)."""

    def softmax(row):
        shifted = [math.exp(x - max(row)) for x in row]
        return [x / sum(shifted) for x in shifted]

    total, gradient = 0.0, []
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist()):
        hard = softmax(s)
        p, q = softmax([x / temperature for x in t]), softmax([x / temperature for x in s])
        kl = sum(a * math.log(a / b) for a, b in zip(p, q))
        total += (1 - weight) * -math.log(hard[label]) + weight * temperature**2 * kl
        gradient.append(
            [
                (1 - weight) * (hard[k] - (k == label)) + weight * temperature * (q[k] - p[k])  # T^2 / T
                for k in range(len(s))
            ]
        )
    return total / len(labels), torch.tensor(gradient, dtype=torch.float64) / len(labels)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_and_gradient_against_a_hand_calculation(temperature, weight):
    generator = torch.Generator().manual_seed(1)
    student = (3 * torch.randn(6, 5, generator=generator)).requires_grad_()
    teacher = 3 * torch.randn(6, 5, generator=generator)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    loss = distill.distillation_loss(student, teacher, labels, temperature, weight)
    loss.backward()
    expected, gradient = loss_by_hand(student.double(), teacher.double(), labels, temperature, weight)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(student.grad.double(), gradient, atol=1e-6)
    assert loss.dtype == torch.float32 and loss.ndim == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_finite_at_extreme_logits(dtype):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, -1e4]], dtype=dtype)
    loss = distill.distillation_loss(student, teacher, torch.tensor([1, 0]), 1.0, 0.5)
    loss.backward()
    assert loss.isfinite() and loss > 1e3 and student.grad.isfinite().all()


def test_the_loss_is_zero_where_the_student_answers_as_the_teacher():
    logits = torch.randn(4, 7)
    assert distill.distillation_loss(logits, logits.half(), torch.zeros(4).long(), 3.0, 1.0).item() < 1e-5


def test_weight_zero_is_training_without_a_teacher(tiny, monkeypatch):
    monkeypatch.setattr(distill, "KD_WEIGHT", 0.0)
    train_teacher.main()
    train_student.main()
    distill.main()
    assert same(weights(tiny / "distilled.pt"), weights(tiny / "student.pt"))
    monkeypatch.setattr(distill, "KD_WEIGHT", 0.5)
    distill.main()
    assert not same(weights(tiny / "distilled.pt"), weights(tiny / "student.pt"))


def test_student_and_distilled_have_the_same_constants():
    shared = ("SEED", "EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "WEIGHT_DECAY")
    assert [getattr(distill, name) for name in shared] == [getattr(train_student, name) for name in shared]


def test_the_teacher_learns_nothing(tiny, monkeypatch):
    train_teacher.main()
    before = (tiny / "teacher.pt").read_bytes()
    loaded = []
    load = models.load_checkpoint

    def spy(*arguments):
        network, checkpoint = load(*arguments)
        loaded.append(network)
        return network, checkpoint

    monkeypatch.setattr(models, "load_checkpoint", spy)
    distill.main()
    (teacher,) = loaded
    assert same(teacher.state_dict(), weights(tiny / "teacher.pt"))  # parameters and batch-norm buffers
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert (tiny / "teacher.pt").read_bytes() == before


def test_the_student_hears_the_answer_to_the_very_view_that_it_sees(tiny, monkeypatch):
    monkeypatch.setattr(data, "HOLD_OUT", 30)
    train_teacher.main()
    train, _ = data.load_train("cpu")
    teacher, _ = models.load_checkpoint("teacher", "synthetic", train.classes, torch.device("cpu"))
    heard = []
    loss = distill.distillation_loss

    def spy(logits, teacher_logits, *others):
        heard.append(teacher_logits)
        return loss(logits, teacher_logits, *others)

    monkeypatch.setattr(distill, "distillation_loss", spy)
    for _ in range(2):  # computed, then read back
        heard.clear()
        distill.main()
        shown = [batch for epoch in range(2) for batch in data.batches(train, 32, epoch, distill.SEED)]
        assert len(shown) == len(heard) == 12
        with torch.no_grad():
            for (images, _, _), answers in zip(shown, heard):
                assert torch.allclose(teacher(images), answers.float(), atol=2e-2, rtol=2e-3)


def test_the_teachers_answers_are_kept_until_anything_they_depend_on_changes(tiny, monkeypatch, capsys):
    computed = []
    predict = models.predict

    def spy(network, split, epoch=None):
        if epoch is not None:
            computed.append(epoch)
        return predict(network, split, epoch)

    monkeypatch.setattr(models, "predict", spy)

    def epochs_computed_by(script=distill):
        computed.clear()
        script.main()
        return list(computed)

    train_teacher.main()
    assert epochs_computed_by() == [0, 1]
    for name, value in (
        ("TEMPERATURE", 2.0),
        ("KD_WEIGHT", 0.1),
        ("SEED", 1),
        ("BATCH_SIZE", 20),
        ("LEARNING_RATE", 0.1),
        ("EPOCHS", 1),
    ):
        monkeypatch.setattr(distill, name, value)
        assert epochs_computed_by() == [], name
    monkeypatch.setattr(models, "STUDENT_WIDTHS", (4, 4, 4, 4))
    assert epochs_computed_by() == []
    monkeypatch.setattr(distill, "EPOCHS", 3)
    assert epochs_computed_by() == [2]

    # Truncated, or in another epoch's place: computed anew, and said so.
    (folder,) = (tiny / "answers").iterdir()
    first, second, third = sorted(folder.iterdir())
    whole = second.read_bytes()
    second.write_bytes(whole[:-50])
    third.write_bytes(first.read_bytes())
    capsys.readouterr()
    assert epochs_computed_by() == [1, 2]
    assert capsys.readouterr().out.count("is damaged or foreign") == 2
    assert torch.load(second)["answers_to"][1] == 1

    for module, name, value in (
        (data, "VIEW_SEED", 1),
        (data, "SHIFT", 1),
        (data, "HOLD_OUT", 30),
        (data, "SYNTHETIC_IMAGES", {"train": 210, "test": 100}),
    ):
        monkeypatch.setattr(module, name, value)
        assert epochs_computed_by() == [0, 1, 2], name
    monkeypatch.setattr(train_teacher, "SEED", 1)
    train_teacher.main()
    assert epochs_computed_by() == [0, 1, 2]
    monkeypatch.setattr(distill, "KEEP_ANSWERS", False)
    assert epochs_computed_by() == [0, 1, 2]


def test_kept_answers_are_small_and_their_size_is_told(tiny, capsys):
    train_teacher.main()
    distill.main()
    (folder,) = (tiny / "answers").iterdir()
    kept = torch.load(folder / "epoch-0000.pt")["logits"]
    assert kept.dtype == torch.float16 and kept.shape == (200, 10)
    assert f" MB in {folder}." in capsys.readouterr().out


def test_training_with_kept_answers_and_with_the_teacher_itself_agree(tiny, monkeypatch):
    monkeypatch.setattr(models, "BFLOAT16", False)  # whose answers float16 holds exactly
    train_teacher.main()
    train, _ = data.load_train("cpu")

    def trained():
        distill.main()
        network, _ = models.load_checkpoint("distilled", "synthetic", train.classes, torch.device("cpu"))
        return models.predict(network, train)

    kept = trained()
    monkeypatch.setattr(
        distill, "teacher_answers", lambda teacher, split, epoch, _: models.predict(teacher, split, epoch)
    )
    monkeypatch.setattr(distill, "KEEP_ANSWERS", False)
    live = trained()
    assert not torch.equal(kept, live)  # half precision is felt, a little
    assert torch.corrcoef(torch.stack([kept.flatten(), live.flatten()]))[0, 1] > 0.95
    assert models.accuracy(kept, train.labels) == pytest.approx(models.accuracy(live, train.labels), abs=0.03)


def test_no_teacher_is_one_sentence(tiny):
    with pytest.raises(SystemExit, match="teacher.pt yet: run python train_teacher.py first"):
        distill.main()


def test_distillation_lowers_the_divergence_from_the_teacher(tiny, monkeypatch):
    for script in (train_teacher, train_student, distill):
        monkeypatch.setattr(script, "EPOCHS", 12)
    train_teacher.main()
    train_student.main()
    distill.main()
    train, _ = data.load_train("cpu")
    logits = {
        name: models.predict(models.load_checkpoint(name, "synthetic", train.classes, torch.device("cpu"))[0], train)
        for name in models.SCRIPTS
    }
    away = {
        name: F.kl_div(
            logits[name].log_softmax(1), logits["teacher"].log_softmax(1), log_target=True, reduction="batchmean"
        ).item()
        for name in ("student", "distilled")
    }
    assert away["distilled"] < away["student"]
