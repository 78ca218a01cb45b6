"""distill.py: the loss, the teacher, its answers."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import same, weights
from torchvision.transforms import Normalize

import data
import distill
import evaluate
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


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 4.0, 20.0, 100.0])  # the first and last are its limits
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_and_gradient_against_a_hand_calculation(temperature, weight):
    generator = torch.Generator().manual_seed(1)
    student = (3 * torch.randn(6, 5, generator=generator)).requires_grad_()
    teacher = 3 * torch.randn(6, 5, generator=generator)
    labels = torch.tensor([0, 4, 2, 2, 1, 3])
    loss = distill.distillation_loss(student, teacher, labels, temperature, weight)
    loss.backward()
    expected, gradient = loss_by_hand(student.double(), teacher.double(), labels, temperature, weight)
    assert loss.item() == pytest.approx(expected, rel=1e-4 if temperature == 100 else 1e-5)
    assert torch.allclose(student.grad.double(), gradient, atol=1e-5 if temperature == 100 else 1e-6)
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
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(models, "load_checkpoint", spy)
    distill.main()
    ((teacher, _),) = loaded
    assert same(teacher.state_dict(), weights(tiny / "teacher.pt"))  # parameters and batch-norm buffers
    assert not any(module.training for module in teacher.modules())
    assert (tiny / "teacher.pt").read_bytes() == before


@pytest.mark.parametrize("mirror", [True, False])
def test_the_teacher_answers_once_and_each_image_gets_its_own_answer(mirror, tiny, monkeypatch):
    monkeypatch.setattr(data, "MIRROR", mirror)
    monkeypatch.setattr(data, "HOLD_OUT", 30)
    train_teacher.main()
    train, _ = data.load_train("cpu")
    teacher, _ = models.load_checkpoint("teacher", "synthetic", train)
    bare = torch.cat([images for images, *_ in data.batches(train, 125)])
    with torch.no_grad():  # the mean over the picture and its mirror image
        expected = (teacher(bare) + teacher(bare.flip(3))) / 2 if mirror else teacher(bare)
    received, shown = [], []
    loss, load = distill.distillation_loss, models.load_checkpoint

    def spy(logits, teacher_logits, *others):
        received.append(teacher_logits)
        return loss(logits, teacher_logits, *others)

    def counting(*arguments):
        network, checkpoint = load(*arguments)
        network.register_forward_hook(lambda _, inputs, __: shown.append(len(inputs[0])))
        return network, checkpoint

    monkeypatch.setattr(distill, "distillation_loss", spy)
    monkeypatch.setattr(models, "load_checkpoint", counting)
    distill.main()
    drawn = [positions for epoch in range(2) for _, _, positions in data.batches(train, 32, epoch, distill.SEED)]
    assert len(drawn) == len(received) == 12 and sum(shown) == (2 if mirror else 1) * len(train)
    for positions, answers in zip(drawn, received):
        assert torch.allclose(expected[positions], answers, atol=2e-2, rtol=2e-3)


def test_answers_that_are_not_finite_are_the_teachers_fault(tiny):
    train_teacher.main()
    content = torch.load(tiny / "teacher.pt", weights_only=True)
    content["state_dict"]["head.weight"][0, 0] = float("nan")
    torch.save(content, tiny / "teacher.pt")
    with pytest.raises(SystemExit, match="^The network of .*teacher.pt gives logits that are not finite"):
        distill.main()


class Normalised(torch.nn.Module):
    """A network from elsewhere, which wants its images normalised."""

    def __init__(self, classes):
        super().__init__()
        self.linear, self.seen = torch.nn.Linear(3072, classes), []

    def forward(self, images):
        self.seen.append(images)
        return self.linear(images.flatten(1))


def test_a_teacher_from_elsewhere_brings_its_own_normalisation(tiny, monkeypatch):
    mean, std = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.5, 0.25, 2.0])
    own = {}

    def teacher(classes):
        own["network"] = Normalised(classes)
        return torch.nn.Sequential(Normalize(mean, std), own["network"])

    monkeypatch.setattr(models, "teacher", teacher)
    train, _ = data.load_train("cpu")
    network = models.teacher(len(train.classes))
    network[1].load_state_dict(Normalised(10).state_dict())
    models.save_checkpoint("teacher", network, train, recipe={})
    distill.main()
    shown = torch.cat([images for images in own["network"].seen if len(images) > 2][::2])  # picture, mirror image, ...
    images = torch.cat([images for images, *_ in data.batches(train, 50)])
    assert torch.allclose(shown, (images - mean.view(3, 1, 1)) / std.view(3, 1, 1), atol=1e-5)


def test_a_teacher_that_knows_the_hold_out_is_refused(tiny, monkeypatch, capsys):
    train_teacher.main()
    distill.main()
    assert "other images" not in capsys.readouterr().out
    monkeypatch.setattr(data, "HOLD_OUT", 30)
    message = "other images than synthetic has now, with HOLD_OUT = 30 and TRAIN_IMAGES = 0, so perhaps on the hold-out"
    with pytest.raises(SystemExit, match=message):
        distill.main()
    train_teacher.main()
    monkeypatch.setattr(data, "HOLD_OUT", 0)
    distill.main()  # the test images are no part of it: a word is enough
    message = "teacher.pt was trained on other images than synthetic has now, with HOLD_OUT = 0 and TRAIN_IMAGES = 0."
    assert message in capsys.readouterr().out


def test_a_teacher_of_the_same_hold_out_and_fewer_images_may_teach(tiny, monkeypatch, capsys):
    monkeypatch.setattr(data, "HOLD_OUT", 30)
    monkeypatch.setattr(data, "TRAIN_IMAGES", 100)
    train_teacher.main()
    monkeypatch.setattr(data, "TRAIN_IMAGES", 0)
    capsys.readouterr()
    distill.main()
    said = "teacher.pt was trained on other images than synthetic has now, with HOLD_OUT = 30"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("labelled", [[0, 2, 5], []])
def test_images_without_a_label_count_in_the_mean_of_both_parts(labelled):
    generator = torch.Generator().manual_seed(1)
    student = (3 * torch.randn(6, 5, generator=generator)).requires_grad_()
    teacher = 3 * torch.randn(6, 5, generator=generator)
    labels = torch.full((6,), -1)
    labels[labelled] = torch.tensor([0, 4, 2])[: len(labelled)]
    loss = distill.distillation_loss(student, teacher, labels, 4.0, 0.9)
    loss.backward()
    by_hand = [loss_by_hand(student[[i]].double(), teacher[[i]].double(), labels[[i]], 4.0, 0.9) for i in labelled]
    rest = [i for i in range(6) if i not in labelled]
    without = [loss_by_hand(student[[i]].double(), teacher[[i]].double(), torch.tensor([0]), 4.0, 1.0) for i in rest]
    expected = (sum(value for value, _ in by_hand) + 0.9 * sum(value for value, _ in without)) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    gradient = torch.zeros(6, 5, dtype=torch.float64)
    for i, (_, part) in zip(labelled + rest, by_hand + [(value, 0.9 * part) for value, part in without]):
        gradient[i] = part[0] / 6
    assert torch.allclose(student.grad.double(), gradient, atol=1e-6)


@pytest.fixture
def few_labels(tiny, monkeypatch):
    """50 of 200 synthetic images have labels, 30 are held out; the teacher has learned from the 50."""
    monkeypatch.setattr(data, "TRAIN_IMAGES", 50)
    monkeypatch.setattr(data, "HOLD_OUT", 30)
    train_teacher.main()
    monkeypatch.setattr(distill, "UNLABELLED", True)
    return tiny


def test_what_train_images_leaves_has_no_label_and_is_never_held_out(few_labels, monkeypatch):
    train, hold_out = data.load_train("cpu")
    both = data.add_unlabelled(train)
    assert len(both) == 170 and both.labels[:50].equal(train.labels) and (both.labels[50:] == -1).all()
    assert sorted([*both.index.tolist(), *hold_out.index.tolist()]) == list(range(200))
    assert both.fingerprint == train.fingerprint
    monkeypatch.setattr(data, "HOLD_OUT", 0)
    monkeypatch.setattr(data, "TRAIN_IMAGES", 0)
    whole, _ = data.load_train("cpu")
    assert both.images.equal(whole.images[both.index])
    with pytest.raises(SystemExit, match="^UNLABELLED = True in distill.py, but synthetic has no images without"):
        data.add_unlabelled(whole)


def test_the_student_learns_from_images_without_a_label(few_labels, monkeypatch, capsys):
    shown, loss = [], distill.distillation_loss

    def spy(logits, teacher_logits, labels, *others):
        shown.append(labels)
        return loss(logits, teacher_logits, labels, *others)

    monkeypatch.setattr(distill, "distillation_loss", spy)
    capsys.readouterr()
    distill.main()
    message = capsys.readouterr().out
    assert "50 images of synthetic and 120 without a label, 12 steps, on cpu" in message
    assert len(shown) == 12 and (torch.cat(shown[:6]) < 0).sum() == 120
    train, _ = data.load_train("cpu")
    teacher, _ = models.load_checkpoint("teacher", "synthetic", train)
    logits = models.predict(teacher, train, mirror=True)
    assert f"right on {models.accuracy(logits, train.labels):.2%} of the training images" in message
    recipe = models.load_file(few_labels / "distilled.pt", "it")["recipe"]
    assert recipe["images"] == train.fingerprint and recipe["unlabelled images"] == 120 and recipe["steps"] == 12
    assert re.fullmatch("[0-9a-f]{16}", recipe["unlabelled"])


def test_the_figures_of_an_epoch_are_of_the_labelled_images(few_labels, monkeypatch):
    steps, update = [], models.Run.update

    def spy(run, *step):
        steps.append(step)
        update(run, *step)

    monkeypatch.setattr(models.Run, "update", spy)
    monkeypatch.setattr(distill, "EPOCHS", 1)
    monkeypatch.setattr(distill, "BATCH_SIZE", 3)  # some batches have no label at all
    distill.main()
    (figures,) = models.load_file(few_labels / "distilled.pt", "it")["curve"]
    logits, labels = (torch.cat([step[place] for step in steps]).float() for place in (1, 2))
    assert any((labels < 0).all() for *_, labels in steps) and len(labels) == 170
    known = labels >= 0
    cross_entropy = F.cross_entropy(logits[known], labels[known].long()).item()
    assert figures["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-4)
    assert figures["accuracy"] == pytest.approx((logits.argmax(1) == labels)[known].float().mean().item())
    assert figures["loss"] == pytest.approx(sum(loss.item() * len(part) for loss, _, part in steps) / 170, rel=1e-4)


def test_the_comparison_says_what_the_distilled_student_has_seen_and_is_fair(few_labels, monkeypatch, capsys):
    train_student.main()
    distill.main()
    monkeypatch.setattr(data, "HOLD_OUT", 0)  # which networks of the training images may be evaluated with
    capsys.readouterr()
    evaluate.main()
    message = capsys.readouterr().out
    seen = "distilled.pt has learned from 120 more images, without labels, in 12 steps; student.pt had 4 steps."
    assert seen in message
    assert "fair comparison" not in message
    monkeypatch.setattr(data, "HOLD_OUT", 30)
    monkeypatch.setattr(distill, "LEARNING_RATE", 0.05)
    monkeypatch.setattr(distill, "EPOCHS", 3)  # so that both take as many steps
    distill.main()
    monkeypatch.setattr(data, "HOLD_OUT", 0)
    capsys.readouterr()
    evaluate.main()
    groups = ", ".join(f"initial_lr of group {number} (0.1, 0.05)" for number in range(3))
    assert f"different LEARNING_RATE (0.1, 0.05), {groups}." in capsys.readouterr().out


def test_an_interrupted_run_with_unlabelled_images_ends_in_the_same_weights(few_labels, monkeypatch):
    distill.main()
    undisturbed = weights(few_labels / "distilled.pt")
    write = models.write_atomically

    def killed(path, content):
        write(path, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(models, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            distill.main()
    monkeypatch.setattr(distill, "UNLABELLED", False)
    with pytest.raises(SystemExit, match="unlabelled .[0-9a-f]{16}, absent"):
        distill.main()
    monkeypatch.setattr(distill, "UNLABELLED", True)
    distill.main()
    assert same(weights(few_labels / "distilled.pt"), undisturbed)


def test_a_test_image_among_the_unlabelled_ones_is_counted(few_labels, monkeypatch, capsys):
    synthetic = data.synthetic
    train, _ = data.load_train("cpu")
    one = data.add_unlabelled(train).index[60].item()

    def with_a_copy(split):
        images, labels, classes = synthetic(split)
        if split == "test":
            images[7] = synthetic("train")[0][one]
        return images, labels, classes

    monkeypatch.setattr(data, "synthetic", with_a_copy)
    distill.main()
    monkeypatch.setattr(data, "HOLD_OUT", 0)
    evaluate.main()
    assert "1 of the test images are also among the training images." in capsys.readouterr().out


def test_a_folder_of_images_with_unlabelled_ones(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DATASET", str(folder))
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path / "made"))
    for script in (train_teacher, train_student, distill):
        monkeypatch.setattr(script, "EPOCHS", 1)
        monkeypatch.setattr(script, "BATCH_SIZE", 18)
    train_teacher.main()
    monkeypatch.setattr(distill, "UNLABELLED", True)
    where = re.escape(str(folder / "unlabelled"))
    with pytest.raises(SystemExit, match=f"has no images without a label: put some into {where}.$"):
        distill.main()
    for name in ("a.png", "deep/er/b.PNG", "deep/@eaDir/c.png", "deep/notes.txt"):
        path = folder / "unlabelled" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / "train" / "dark" / "3.png").read_bytes())
    distill.main()
    assert "36 images of my images-" in (message := capsys.readouterr().out) and " and 2 without a label" in message
    both = data.add_unlabelled(data.load_train("cpu")[0])
    assert both.images[36].equal(both.images[37])
    assert (both.images[36].numpy() == data.read_image(folder / "train" / "dark" / "3.png")).all()


def test_the_line_about_the_teacher_shows_that_its_classes_are_in_another_order(tiny, monkeypatch, capsys):
    monkeypatch.setattr(train_teacher, "EPOCHS", 12)
    train_teacher.main()
    train, _ = data.load_train("cpu")
    teacher, _ = models.load_checkpoint("teacher", "synthetic", train)
    said = []
    for _ in range(2):
        models.save_checkpoint("teacher", teacher, train, recipe={})
        capsys.readouterr()
        distill.main()
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher: ")]
        pattern = r"teacher: ([\d,]+) parameters, right on ([\d.]+)% of .* images"
        parameters, right = re.fullmatch(pattern, line).groups()
        assert parameters == f"{sum(p.numel() for p in teacher.parameters()):,}"
        said.append(float(right))
        teacher.head.weight.data = teacher.head.weight.data.roll(1, 0)
    logits = models.predict(models.load_checkpoint("teacher", "synthetic")[0], train, mirror=True)
    assert said[1] == pytest.approx(100 * (logits.argmax(1) == train.labels).float().mean().item(), abs=0.01)
    assert said[0] > 2 * said[1]


def test_no_teacher_is_one_sentence(tiny):
    with pytest.raises(SystemExit, match="teacher.pt: run python train_teacher.py first"):
        distill.main()


def test_distillation_lowers_the_divergence_from_the_teacher(tiny, monkeypatch):
    for script in (train_teacher, train_student, distill):
        monkeypatch.setattr(script, "EPOCHS", 12)
    train_teacher.main()
    train_student.main()
    distill.main()
    train, _ = data.load_train("cpu")
    logits = {
        name: models.predict(models.load_checkpoint(name, "synthetic", train)[0], train)
        for name in models.SCRIPTS
    }
    away = {
        name: F.kl_div(
            logits[name].log_softmax(1), logits["teacher"].log_softmax(1), log_target=True, reduction="batchmean"
        ).item()
        for name in ("student", "distilled")
    }
    assert away["distilled"] < away["student"]
