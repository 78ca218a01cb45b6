"""models.py: networks, optimizer, prediction, checkpoints, runs."""

import itertools
import json
import os
import pickle
import random
import re
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from conftest import Hostile, run_edited, same, weights
from torch import nn

import data
import distill
import evaluate
import models
import train_student
import train_teacher


def test_the_student_costs_a_tenth_of_the_teacher():
    teacher, student = models.teacher(10), models.student(10)
    parameters = [sum(p.numel() for p in network.parameters()) for network in (teacher, student)]
    macs = [evaluate.multiply_accumulates(network.eval(), torch.zeros(1, 3, 32, 32)) for network in (teacher, student)]
    assert parameters[1] <= 0.145 * parameters[0] and macs[1] <= 0.105 * macs[0]
    assert parameters[1] <= 300_000 and macs[1] <= 12_500_000


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_any_number_of_classes(classes):
    assert models.student(classes)(torch.zeros(4, 3, 32, 32)).shape == (4, classes)


def test_initial_weights_follow_from_the_seed(tiny):
    train, _ = data.load_train("cpu")
    states = [models.new_network(models.student, train, seed).state_dict() for seed in (1, 1, 2)]
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_the_schedule_rises_to_the_learning_rate_and_falls_to_zero():
    for steps in (1, 2, 3, 10, 1000):
        optimizer = models.Muon(nn.Linear(3, 2), 0.5, 1e-3, steps)
        schedule = models.make_schedule(optimizer, steps)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[1]["lr"])
            optimizer.step()
            schedule.step()
        assert 0 < min(rates) and max(rates) <= 0.5
        peak = rates.index(max(rates))
        assert rates == sorted(rates[: peak + 1]) + sorted(rates[peak + 1 :], reverse=True)
        assert schedule.get_last_lr() == pytest.approx([0, 0, 0])
    assert max(rates) == pytest.approx(0.5) and peak == pytest.approx(200, abs=1)


@pytest.mark.parametrize("shape", [(16, 27), (64, 12), (48, 144)])
def test_orthogonalise_against_the_singular_value_decomposition(shape, monkeypatch):
    monkeypatch.setattr(models, "BFLOAT16", False)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.diag(left.mT @ models.orthogonalise(matrix) @ right.mT)
    rest = models.orthogonalise(matrix) - left @ values.diag() @ right
    assert 0.3 < values.min() and values.max() < 1.3  # Newton-Schulz with few steps is no closer than that
    expected = torch.linalg.svdvals(matrix / matrix.norm())
    for _ in range(3):  # what a step makes of each singular value
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    assert torch.allclose(values, expected, atol=1e-4)
    assert rest.abs().max() < 1e-4  # the singular vectors are the matrix's own


@pytest.mark.parametrize("rank, least", [(256, 0.25), (512, 0.18)])
def test_orthogonalise_at_the_ranks_that_its_docstring_names(rank, least, monkeypatch):
    """Half of the singular values a tenth of the others, and some cases more between them."""
    monkeypatch.setattr(models, "BFLOAT16", False)
    found = []
    for share in (1 / rank, 0.1, 0.5, 0.9):
        values = torch.ones(rank)
        values[round(share * rank) :] = torch.linspace(0.1, 1, rank - round(share * rank))
        found += [models.orthogonalise(torch.diag(values)).diag(), models.orthogonalise(torch.diag(values**0)).diag()]
        values[round(share * rank) :] = 0.1
        found.append(models.orthogonalise(torch.diag(values)).diag())
    assert least <= min(part.min() for part in found) < least + 0.02 and max(part.max() for part in found) < 1.21


def test_a_kernels_step_is_the_orthogonal_one_and_the_rest_is_sgds():
    network = nn.Sequential(nn.Conv2d(5, 5, 1), models.Stage(5, 4), nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(8, 5, 4, 4)
    network(images)
    other = deepcopy(network)
    muon = models.Muon(network, 0.1, 0.01, 1000)
    sgd = torch.optim.SGD(other[3].parameters(), lr=0.1, momentum=models.MOMENTUM, nesterov=True)
    assert [group["lr"] for group in muon.param_groups] == [0.1] * 3
    assert muon.turn == pytest.approx(models.MUON_SCALE / 1000**0.75)
    angle = 0.1 * muon.turn
    shortest, short, long, longest = (
        models.Muon(network, 0.1, 0.01, steps).turn for steps in (1, 288, 4800, 48000)
    )
    assert shortest == short > muon.turn > long == longest  # very short and very long trainings turn at one angle each
    kernel, momentum = network[1].conv1.weight.detach().clone(), torch.zeros(4, 45)
    for _ in range(3):
        for model in (network, other):
            model.zero_grad()
            model(images).square().sum().backward()
        gradient = network[1].conv1.weight.grad.flatten(1).clone()
        muon.step()
        momentum = models.MUON_MOMENTUM * momentum + gradient
        turn = models.orthogonalise(gradient + models.MUON_MOMENTUM * momentum).view_as(kernel)
        kernel = kernel * 2 / kernel.norm() - angle * turn
        assert torch.allclose(network[1].conv1.weight, kernel, atol=1e-6)
        other[0].load_state_dict(network[0].state_dict())
        other[1].load_state_dict(network[1].state_dict())
        other[3].weight.grad.add_(other[3].weight, alpha=0.01)
        sgd.step()
        assert torch.allclose(network[3].weight, other[3].weight, atol=1e-6)


def test_muon_leaves_all_but_bare_convolutions_to_sgd():
    """Whatever may have no normalisation after it keeps its length: here the first convolution, and one with a bias."""
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Flatten())
    own.append(nn.LazyLinear(2))
    own.layer_scale = nn.Parameter(torch.full((4, 1, 1, 1), 0.01))
    own(torch.zeros(2, 3, 8, 8))
    before = {name: value.clone() for name, value in own.state_dict().items()}
    optimizer = models.Muon(own, 1e-6, 0.0, 10)
    for parameter in own.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.allclose(value, before[name], atol=1e-5) for name, value in own.state_dict().items())
    assert not any(torch.equal(parameter, before[name]) for name, parameter in own.named_parameters())
    student = models.student(10)
    muon = {id(kernel) for kernel in models.Muon(student, 0.1, 0.01, 10).param_groups[0]["params"]}
    for name, parameter in student.named_parameters():
        assert (id(parameter) in muon) == ("stages" in name and parameter.ndim == 4), name


def test_muon_turns_the_kernels_of_other_networks_by_an_angle_and_keeps_their_norms():
    torch.manual_seed(0)
    tall, wide = nn.Conv2d(8, 32, 1, bias=False), nn.Conv2d(32, 4, 3, bias=False)
    zeros = nn.Conv2d(4, 4, 1, bias=False)
    nn.init.zeros_(zeros.weight)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), tall, wide, zeros, nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(8, 3, 8, 8)
    network(images)
    optimizer = models.Muon(network, 0.01, 0.0, 288)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3, 2]
    before = [kernel.detach().clone() for kernel in (tall.weight, wide.weight)]
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    angle = 0.01 * optimizer.turn
    for kernel, old in zip((tall.weight, wide.weight), before):
        assert ((kernel - old).norm() / old.norm()).item() == pytest.approx(angle, rel=0.3)
        assert kernel.norm().item() == pytest.approx(old.norm().item(), rel=0.01)
    assert zeros.weight.any()  # SGD moves it
    unturned = [parameter.clone() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = None
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), unturned))


def test_weight_decay_spares_biases_and_normalisation():
    network = models.student(10)
    optimizer = models.Muon(network, 0.1, 0.01, 10)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in network.named_parameters():
        kernel = "stages" in name and parameter.ndim == 4  # held at one length: nothing to decay
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and not kernel), name


@pytest.mark.parametrize(
    "capable, wanted, used", [(True, True, "bfloat16"), (True, False, "float32"), (False, True, "float32")]
)
def test_bfloat16_is_for_processors_made_for_it(capable, wanted, used, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable}, raising=False)
    monkeypatch.setattr(models, "BFLOAT16", wanted)
    device = torch.device("cpu")
    assert models.precision(device) == getattr(torch, used)
    with models.autocast(device):
        product = nn.Linear(8, 8)(torch.zeros(4, 8))
    assert str(product.dtype) == f"torch.{used}"


@pytest.mark.parametrize("bfloat16, tolerance", [(False, 1e-5), (True, 1e-2)])
def test_predict_is_in_eval_mode_and_changes_no_weight(bfloat16, tolerance, tiny, monkeypatch):
    monkeypatch.setattr(models, "BFLOAT16", bfloat16)
    train, _ = data.load_train("cpu")
    network = models.new_network(models.student, train, 0).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits = models.predict(network, train)
    assert not network.training and same(network.state_dict(), before)
    images = torch.cat([images for images, *_ in data.batches(train, 50)])
    with torch.no_grad():
        assert torch.allclose(network.eval()(images), logits, atol=tolerance)
    weight = torch.ones(10, requires_grad=True)
    (logits * weight).sum().backward()  # a user's loss may want a gradient
    assert torch.allclose(weight.grad, logits.sum(0), rtol=1e-4)


def test_a_checkpoint_holds_what_it_takes_to_use_it(tiny):
    train_student.main()
    train, _ = data.load_train("cpu")
    content = torch.load(tiny / "student.pt", weights_only=True)
    assert {"network", "state_dict", "recipe", "dataset", "classes"} <= content.keys()
    assert content["recipe"]["EPOCHS"] == 2 and content["classes"] == list(train.classes)
    network, _ = models.load_checkpoint("student", "synthetic", train)
    assert not network.training and same(network.state_dict(), content["state_dict"])


def another_normalisation(network, images, shift=0.49):
    features = network.stages(torch.relu(network.stem((images - shift) * 4)))
    return network.head(features.amax((2, 3))) / 9


def another_pooling(network, images):
    features = network.stages(torch.relu(network.stem((images - 0.5) * 4)))
    return network.head(features.mean((2, 3))) / 9


def another_order_of_channels(network, images):
    return another_normalisation(network, images.flip(1), 0.5)


def another_activation(stage, features):
    features = torch.tanh(stage.norm1(nn.functional.max_pool2d(stage.conv1(features), 2)))
    return torch.tanh(stage.norm2(stage.conv2(features)))


EDITS = [
    (models.ConvNet, "forward", another_normalisation),
    (models.ConvNet, "forward", another_pooling),
    (models.ConvNet, "forward", another_order_of_channels),
    (models.Stage, "forward", another_activation),
    (models, "TEACHER_WIDTHS", (6, 8, 12)),
    (models, "teacher", lambda classes: resnet18(classes)),
]


@pytest.mark.parametrize("owner, name, value", EDITS)
def test_a_network_that_answers_otherwise_than_when_it_was_saved_does_not_teach(
    owner, name, value, tiny, monkeypatch
):
    train_teacher.main()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, value)
        path = re.escape(str(tiny / "teacher.pt"))
        with pytest.raises(
            SystemExit, match=rf"^teacher\(\) in models.py makes another network than {path} holds: undo the edit"
        ):
            distill.main()
        with pytest.raises(SystemExit, match="another network than"):
            evaluate.main()
    distill.main()


class Unregistered(nn.Linear):
    """Keeps a random tensor that its state_dict does not have."""

    def __init__(self, classes):
        super().__init__(3072, classes)
        self.projection = torch.randn(3072)

    def forward(self, images):
        return super().forward(images.flatten(1) * self.projection)


def test_a_random_tensor_outside_the_state_dict_is_found_when_the_network_is_loaded(tiny, monkeypatch):
    monkeypatch.setattr(models, "student", lambda classes: Unregistered(classes))
    train_student.main()
    with pytest.raises(SystemExit, match=r"student\(\) in models.py makes another network than"):
        evaluate.main()


def resnet18(classes):
    return torchvision.models.resnet18(num_classes=classes)


@pytest.mark.parametrize("make", [models.teacher, models.student, resnet18])
def test_rounding_does_not_make_another_network(make, tiny):
    """One thread or two, channels-last or not, with oneDNN or without."""
    torch.manual_seed(0)
    network, answers = make(10), []
    for channels_last in (False, True):
        for threads in (1, 2):
            for onednn in (True, False):
                network.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
                torch.set_num_threads(threads)
                with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
                    answers.append(models.check_logits(network, 10, "it"))
    torch.set_num_threads(1)
    apart = max((a - b).abs().max() for a in answers for b in answers)
    assert apart < 0.1 * models.TOLERANCE * answers[0].abs().max()


def test_a_network_that_is_random_in_eval_mode_is_saved_and_loaded(tiny, monkeypatch):
    class Random(nn.Linear):
        def forward(self, images):
            return super().forward(images.flatten(1)) + torch.rand(10)

    monkeypatch.setattr(models, "student", lambda classes: Random(3072, classes))
    train_student.main()
    network, checkpoint = models.load_checkpoint("student", "synthetic")
    assert same(network.state_dict(), checkpoint["state_dict"])


def test_a_network_of_ones_own_takes_the_students_place(tiny, monkeypatch):
    def own(classes):
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, classes))

    monkeypatch.setattr(models, "student", own)
    train_student.main()
    train, _ = data.load_train("cpu")
    network, _ = models.load_checkpoint("student", "synthetic", train)
    assert isinstance(network, nn.Sequential)
    monkeypatch.undo()
    monkeypatch.setenv("CHECKPOINT_DIR", str(tiny.parent))
    with pytest.raises(SystemExit, match="student.. in models.py makes another network than .*student.pt holds"):
        models.load_checkpoint("student", "synthetic", train)


@pytest.mark.parametrize("kind", ["empty", "text", "opcode", "hostile", "truncated", "foreign", "format 1"])
def test_a_file_that_is_no_checkpoint_is_named_and_not_executed(kind, tiny, tmp_path, monkeypatch):
    train_student.main()
    path = tiny / "student.pt"
    if kind == "hostile":
        torch.save({"state_dict": Hostile()}, path)
    elif kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "format 1":
        torch.save({key: 1 if key == "format" else value for key, value in models.load_file(path, "it").items()}, path)
    else:
        path.write_bytes(
            {"empty": b"", "text": b"hello", "opcode": b"broken", "truncated": path.read_bytes()[:-1000]}[kind]
        )
    monkeypatch.chdir(tmp_path)
    train, _ = data.load_train("cpu")
    expected = "is of another version of models.py" if kind in ("foreign", "format 1") else r"cannot be read \(\w+\)"
    with pytest.raises(SystemExit, match=f"student.pt {expected}: delete it and run python train_student.py again"):
        models.load_checkpoint("student", "synthetic", train)
    assert not (tmp_path / "executed").exists()


def test_the_hostile_file_would_work_if_it_were_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "executed").exists()


def test_other_classes_are_refused(tiny):
    train_student.main()
    train, _ = data.load_train("cpu")
    with pytest.raises(SystemExit, match="other classes.*train_student.py"):
        models.load_checkpoint("student", "synthetic", replace(train, classes=("cat", "dog")))


def with_dropout(classes):
    hidden = nn.LazyLinear(8), nn.BatchNorm1d(8), nn.ReLU()
    return nn.Sequential(nn.Flatten(), nn.Dropout(), *hidden, nn.Linear(8, classes))


def with_weight_norm(classes):
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(3072, classes)))


def with_weight_norm_in_a_stage(classes):
    network = models.ConvNet(classes, models.STUDENT_WIDTHS)
    nn.utils.parametrizations.weight_norm(network.stages[0].conv1)  # whose weight is no parameter any more
    return network


def with_spectral_norm(classes):
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(3072, classes)))


def with_group_norm_after_relu(classes):
    convolution, norm = nn.Conv2d(3, 8, 3, stride=4), nn.GroupNorm(2, 8)
    return nn.Sequential(convolution, nn.ReLU(), norm, nn.Flatten(), nn.Linear(512, classes))


def with_unused_parts_and_widths(classes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))
    network.unused, network.widths = nn.Parameter(torch.ones(3, 3)), torch.ones(2)
    network.register_buffer("mask", torch.tensor(float("-inf")))
    return network


OWN = [with_dropout, with_weight_norm, with_weight_norm_in_a_stage, with_spectral_norm, with_group_norm_after_relu]
OWN += [with_unused_parts_and_widths]


@pytest.mark.parametrize("own", OWN)
def test_networks_of_ones_own_are_trained_interrupted_loaded_and_evaluated(own, tiny, monkeypatch):
    monkeypatch.setattr(models, "student", own)
    monkeypatch.setattr(models, "BFLOAT16", False)
    train_student.main()
    undisturbed = weights(tiny / "student.pt")
    interrupt(monkeypatch, train_student, 9)
    train_student.main()
    assert same(weights(tiny / "student.pt"), undisturbed)
    train, _ = data.load_train("cpu")
    network, _ = models.load_checkpoint("student", "synthetic", train)
    with torch.no_grad():
        expected = torch.cat([network(images) for images, *_ in data.batches(train, 50)])
    assert torch.allclose(models.predict(network, train), expected, atol=1e-4)
    evaluate.main()


def interrupt(monkeypatch, script, steps):
    """Runs a script that is interrupted after so many steps."""
    left, update = iter(range(steps)), models.Run.update

    def interrupted(run, *arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        update(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(models.Run, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.main()


@pytest.mark.parametrize("script", [train_teacher, train_student, distill])
def test_an_interrupted_run_ends_in_the_same_weights(script, tiny, monkeypatch, capsys):
    name = next(name for name, file in models.SCRIPTS.items() if script.__file__.endswith(file))
    if script is distill:
        train_teacher.main()
    monkeypatch.setattr(script, "EPOCHS", 3)
    script.main()
    undisturbed = weights(tiny / f"{name}.pt")
    for steps in (3, 9, 10):  # of seven an epoch: in the first epoch, in the second, and, continued there, in the third
        interrupt(monkeypatch, script, steps)
    assert same(weights(tiny / f"{name}.pt"), undisturbed)  # the checkpoint of the run before is still there
    (tiny / f"{name}.pt").unlink()
    capsys.readouterr()
    script.main()
    assert "Continuing the unfinished run after epoch 2 of 3." in capsys.readouterr().out
    assert same(weights(tiny / f"{name}.pt"), undisturbed)
    assert not list(tiny.glob("*.progress.pt"))


@pytest.mark.parametrize(
    "module, name, value",
    [
        (train_student, "LEARNING_RATE", 0.05),
        (train_student, "ALPHA", [5.0]),  # a constant of the user's own
        (data, "SHIFT", 3),
        (models, "STUDENT_WIDTHS", [4, 4, 4]),
    ],
)
def test_an_unfinished_run_waits_until_its_constants_come_back(module, name, value, tiny, monkeypatch, capsys):
    before = getattr(module, name, "absent")
    before = list(before) if isinstance(before, tuple) else before
    train_student.main()
    expected = weights(tiny / "student.pt")
    interrupt(monkeypatch, train_student, 9)
    what = f"{name} \\({re.escape(str(before))}, {re.escape(str(value))}\\)"
    path = re.escape(str(tiny / "student.progress.pt"))
    message = f"^{path} is an unfinished run with other constants or code \\(then, now\\): {what}.*. Restore them"
    with monkeypatch.context() as patch:
        patch.setattr(module, name, value, raising=False)
        with pytest.raises(SystemExit, match=message):
            train_student.main()
    train_student.main()
    assert "Continuing the unfinished run after epoch 1 of 2." in capsys.readouterr().out
    assert same(weights(tiny / "student.pt"), expected) and not list(tiny.glob("*.progress.pt"))


def test_an_unfinished_run_belongs_to_the_own_modules_that_began_it(tiny, own_module, monkeypatch):
    interrupt(monkeypatch, train_student, 9)
    text = own_module.read_text()
    own_module.write_text("SCALE = 2.0\n")
    with pytest.raises(SystemExit, match=r"or code .then, now.: parts/loss.py \([0-9a-f]{8}, [0-9a-f]{8}\). "):
        train_student.main()
    own_module.write_text(text)
    train_student.main()


@pytest.mark.parametrize("name, counts", [
    ("parts/loss.py", True),
    ("loss.py", True),
    ("tests/helper.py", False),
    (".venv/lib/python3.11/site-packages/package/part.py", False),
    ("train_teacher.py", False),
    ("evaluate.py", False),
    ("../elsewhere.py", False),
])  # fmt: skip
def test_own_modules_are_those_below_the_folder_of_the_scripts(name, counts, own_module, monkeypatch):
    path = models.ROOT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("X = 1\n")
    sys.modules["parts.loss"].__file__ = str(path)
    recipe = models.recipe_of_files(vars(train_student))
    assert (name in recipe) == counts and set(recipe) >= {"train_student.py", "EPOCHS"}
    assert [key for key in recipe if ".py" in key and key not in (name, "train_student.py")] == []


def test_an_unfinished_run_on_other_images_is_not_continued(tiny, monkeypatch):
    interrupt(monkeypatch, train_student, 9)
    drawn = data.synthetic("train")
    monkeypatch.setattr(data, "synthetic", lambda split: (255 - drawn[0], *drawn[1:]))
    with pytest.raises(SystemExit, match="unfinished run .*: images \\("):
        train_student.main()


def test_an_unfinished_run_belongs_to_the_code_that_began_it(tiny, tmp_path, monkeypatch, capsys):
    script, shared = (run_edited(monkeypatch, module, tmp_path) for module in (train_student, models))
    text, shared_text = (file.read_text(encoding="utf-8") for file in (script, shared))
    interrupt(monkeypatch, train_student, 9)
    assert text.count("loss = F.cross_entropy(") == 1
    script.write_text(text.replace("loss = F.cross_entropy(", "loss = 2 * F.cross_entropy("), encoding="utf-8")
    with pytest.raises(
        SystemExit, match="constants or code .then, now.: train_student.py .[0-9a-f]{8}, [0-9a-f]{8}.. "
    ):
        train_student.main()
    script.write_text(text.replace("\n", "\r\n"), encoding="utf-8")  # as on Windows
    old, new = "# images: what fills a GPU", "# what fills a GPU"
    assert shared_text.count(old) == 1
    shared.write_text(shared_text.replace(old, new), encoding="utf-8")  # a line that assigns a constant
    train_student.main()
    assert "Continuing the unfinished run after epoch 1 of 2." in capsys.readouterr().out


def test_the_hash_of_code_is_of_all_lines_but_those_of_constants(tmp_path):
    path = tmp_path / "code.py"

    def code_hash(text, constants=("RATE",)):
        path.write_text(text, encoding="utf-8")
        return models.code_hash(path, constants)

    text = "RATE = 0.1  # held by the recipe\nTABLE = build(1)\n"
    assert code_hash(text) == code_hash(text.replace("0.1", "0.2")) == code_hash(text.replace("\n", "\r\n"))
    assert len({code_hash(text), code_hash(text.replace("1)", "2)")), code_hash(text, ()), code_hash("")}) == 4


def test_an_edit_that_changes_no_layer_but_its_text_stops_no_resume(tiny, monkeypatch, capsys):
    class Named(nn.Linear):
        def extra_repr(self):
            return str(np.random.default_rng().random())  # as the address of an object

    monkeypatch.setattr(models, "student", lambda classes: nn.Sequential(nn.Flatten(), Named(3072, classes)))
    interrupt(monkeypatch, train_student, 9)
    train_student.main()
    assert "Continuing the unfinished run after epoch 1 of 2." in capsys.readouterr().out


def test_any_optimizer_is_trained_scheduled_and_resumed(tiny, monkeypatch):
    made = []

    def adamw(network, *_):
        made.append(torch.optim.AdamW(network.parameters(), 1e-3))
        return made[-1]

    monkeypatch.setattr(models, "Muon", adamw)
    rates, update = [], models.Run.update

    def spy(run, *arguments):
        rates.append(made[-1].param_groups[0]["lr"])  # the next step's
        update(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(models.Run, "update", spy)
        train_student.main()
    assert len(rates) == 14 and 0.7e-3 < max(rates) <= 1e-3 and rates[-1] == 0
    before = weights(tiny / "student.pt")
    interrupt(monkeypatch, train_student, 9)
    train_student.main()
    assert same(weights(tiny / "student.pt"), before)


def test_leaving_a_batch_loop_early_hurts_nothing(tiny, monkeypatch):
    monkeypatch.setattr(
        data, "batches", lambda *arguments, batches=data.batches: itertools.islice(batches(*arguments), 2)
    )
    train_student.main()
    assert [line["epoch"] for line in models.load_file(tiny / "student.pt", "it")["curve"]] == [1, 2]


class Returns(nn.Module):
    """Returns what `answer` makes of logits."""

    def __init__(self, classes, answer):
        super().__init__()
        self.linear, self.answer = nn.Linear(3072, classes), answer

    def forward(self, images):
        return self.answer(self.linear(images.flatten(1)))


@pytest.mark.parametrize(
    "answer, found",
    [
        (lambda logits: None, "NoneType"),
        (lambda logits: (logits, logits), "tuple"),
        (lambda logits: logits[:, :1], r"\[2, 1\]"),
        (lambda logits: logits.flatten(), r"\[20\]"),
    ],
)
def test_a_student_that_returns_no_logits_is_named(answer, found, tiny, monkeypatch):
    monkeypatch.setattr(models, "student", lambda classes: Returns(classes, answer))
    with pytest.raises(SystemExit, match=rf"must map images \[2, 3, 32, 32\] to logits \[2, 10\], not to {found}.$"):
        train_student.main()


def test_a_return_that_was_forgotten_is_named(tiny, monkeypatch):
    def student(classes):
        nn.Linear(3, classes)

    monkeypatch.setattr(models, "student", student)
    with pytest.raises(SystemExit, match=r"^student\(\) in models.py must map .*, not to NoneType.$"):
        train_student.main()


def test_a_teacher_of_one_logit_is_named_where_it_comes_in(tiny, monkeypatch):
    train, _ = data.load_train("cpu")
    one, nine = (nn.Sequential(nn.Flatten(), nn.Linear(3072, logits)) for logits in (1, 9))
    for network in (one, nine):
        with pytest.raises(SystemExit, match="^The network of teacher.pt must map"):
            models.save_checkpoint("teacher", network, train, recipe={})
    train_teacher.main()
    content = models.load_file(tiny / "teacher.pt", "it")
    monkeypatch.setattr(models, "teacher", lambda classes: one)
    torch.save(content | {"widths": None, "state_dict": one.state_dict()}, tiny / "teacher.pt")
    with pytest.raises(SystemExit, match=r"^The network of .*teacher.pt must map .*, not to \[2, 1\].$"):
        distill.main()


def test_asking_a_new_network_changes_nothing_of_it(tiny):
    train, _ = data.load_train("cpu")
    state = models.new_network(models.student, train, 0).state_dict()
    torch.manual_seed(0)
    assert same(state, models.student(10).state_dict())


class Frozen(nn.Sequential):
    """A backbone whose batch normalisation stays in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def test_batch_normalisation_that_is_frozen_stays_as_it_is(tiny, monkeypatch):
    def student(classes):
        network = Frozen(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, classes))
        network[1].running_mean.fill_(5)
        return network

    monkeypatch.setattr(models, "student", student)
    monkeypatch.setattr(train_student, "LEARNING_RATE", 1e-4)
    train_student.main()
    assert (weights(tiny / "student.pt")["1.running_mean"] == 5).all()


def test_a_recipe_holds_the_plain_constants_of_all_three_files(tiny, monkeypatch):
    monkeypatch.setattr(train_student, "CLASS_WEIGHTS", {"cat": 2.0}, raising=False)
    monkeypatch.setattr(train_student, "CLIP", float("inf"), raising=False)
    monkeypatch.setattr(train_student, "NESTEROV", False, raising=False)
    monkeypatch.setattr(train_student, "LOSS", nn.functional.mse_loss, raising=False)  # is in the hash of the code
    train_student.main()
    recipe = models.load_file(tiny / "student.pt", "it")["recipe"]
    assert recipe["CLASS_WEIGHTS"] == {"cat": 2.0} and recipe["CLIP"] == "Infinity" and recipe["EPOCHS"] == 2
    assert recipe["SHIFT"] == data.SHIFT and recipe["MOMENTUM"] == models.MOMENTUM and recipe["WORLD_SIZE"] == 1
    assert recipe["NESTEROV"] is False and recipe["weight_decay of group 2"] == 0 and "LOSS" not in recipe
    assert recipe["optimizer"] == "Muon" and recipe["maximize of group 0"] is False
    assert {"train_student.py", "data.py", "models.py"} == {key for key in recipe if ".py" in key}
    assert not {"DATASET", "DATA_DIR", "CHECKPOINT_DIR", "RANK", "LIMITS", "SCRIPTS"} & recipe.keys()
    assert json.loads(json.dumps(recipe, allow_nan=False)) == recipe


def test_few_steps_are_named_with_the_epochs_that_would_be_enough(tiny, folder, monkeypatch, capsys):
    train_student.main()
    assert "200 images of synthetic, 14 steps, on cpu\nepoch" in capsys.readouterr().out  # a first run is to be short
    monkeypatch.setenv("DATASET", str(folder))
    train_student.main()
    message = capsys.readouterr().out
    advice = "student: few steps; with EPOCHS = 250 in train_student.py there would be 500."
    assert f", 4 steps, on cpu\n{advice}\n" in message
    train_teacher.main()
    assert "teacher: few steps; with EPOCHS = 250 in train_teacher.py there would be 500." in capsys.readouterr().out
    distill.main()
    assert "distilled: few steps; with EPOCHS = 2000 in distill.py there would be 4,000." in capsys.readouterr().out
    monkeypatch.setattr(train_student, "BATCH_SIZE", 12)
    monkeypatch.setattr(train_student, "EPOCHS", 125)
    monkeypatch.setattr(models.Run, "epochs", lambda run: iter(()))
    with pytest.raises(SystemExit, match="0 of 125 epochs were done"):
        train_student.main()
    assert "few steps" not in capsys.readouterr().out


def test_a_loop_that_was_left_saves_nothing(tiny, monkeypatch):
    epochs = models.Run.epochs
    for done in (0, 1):
        monkeypatch.setattr(models.Run, "epochs", lambda run, done=done: itertools.islice(epochs(run), done))
        message = f"^student: {max(0, done - 1)} of 2 epochs were done, so nothing is saved. To stop earlier, lower"
        with pytest.raises(SystemExit, match=message):
            train_student.main()
    assert not (tiny / "student.pt").exists()


def test_with_a_hold_out_every_epoch_is_measured_with_renewed_statistics(tiny, monkeypatch):
    monkeypatch.setattr(data, "HOLD_OUT", 40)
    measured, predict, renew = [], models.predict, models.renew_statistics

    def renewed(network, batches):
        renew(network, batches)
        measured.append(network.stages[0].norm1.running_mean.clone())

    def predicted(network, split, **options):
        assert torch.equal(measured[-1], network.stages[0].norm1.running_mean)
        return predict(network, split, **options)

    monkeypatch.setattr(models, "renew_statistics", renewed)
    monkeypatch.setattr(models, "predict", predicted)
    train_student.main()
    assert len(measured) == 2
    monkeypatch.setattr(data, "HOLD_OUT", 0)
    train_student.main()
    assert len(measured) == 3  # without one only those of the last epoch are needed


def separable(split):
    """99 images of three classes that differ in brightness."""
    rng = np.random.default_rng([split == "test"])
    labels = np.arange(99) % 3
    noise = rng.integers(0, 220, (99, 32, 32, 3))
    return (noise + 15 * labels[:, None, None, None]).astype(np.uint8), labels, ["dark", "grey", "light"]


def test_few_images_are_enough_for_a_right_evaluation(monkeypatch, tmp_path):
    """After 24 steps batch normalisation's running statistics still hold a part of their first values."""
    monkeypatch.setenv("DATASET", "synthetic")
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path))
    monkeypatch.setattr(data, "synthetic", separable)
    monkeypatch.setattr(train_student, "BATCH_SIZE", 50)
    train_student.main()
    test = data.load_test("cpu")
    network, _ = models.load_checkpoint("student", "synthetic", test)
    assert models.accuracy(models.predict(network, test), test.labels) >= 0.97


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_teachers_labels_are_smoothed(smoothing, tiny, monkeypatch):
    steps, update = [], models.Run.update

    def spy(run, *step):
        steps.append(step)
        update(run, *step)

    monkeypatch.setattr(models.Run, "update", spy)
    monkeypatch.setattr(train_teacher, "LABEL_SMOOTHING", smoothing)
    train_teacher.main()
    assert steps
    for loss, logits, labels in steps:
        shares = torch.full(logits.shape, smoothing / logits.shape[1])
        shares[torch.arange(len(labels)), labels] += 1 - smoothing
        expected = -(shares * logits.float().log_softmax(1)).sum(1).mean()
        assert torch.allclose(loss, expected, rtol=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tiny, monkeypatch):
    train_student.main()
    before = (tiny / "student.pt").read_bytes()
    monkeypatch.setattr(train_student, "LEARNING_RATE", 1e30)
    with pytest.raises(SystemExit, match="Training diverged in epoch 1: lower LEARNING_RATE in train_student.py.$"):
        train_student.main()
    assert (tiny / "student.pt").read_bytes() == before


def test_a_weight_that_is_not_finite_after_the_last_step_is_not_saved(tiny, monkeypatch):
    update = models.Run.update

    def broken(run, *arguments):
        update(run, *arguments)
        run.network.head.weight.data[0, 0] = float("inf")

    monkeypatch.setattr(models.Run, "update", broken)
    monkeypatch.setattr(train_student, "BATCH_SIZE", 200)  # one step, whose loss was finite
    monkeypatch.setattr(train_student, "EPOCHS", 1)
    with pytest.raises(SystemExit, match="The network of student.pt gives logits that are not finite"):
        train_student.main()
    assert not (tiny / "student.pt").exists()


def test_finite_weights_that_answer_nothing_finite_are_not_saved(tiny, monkeypatch):
    for name, value in (("EPOCHS", 1), ("BATCH_SIZE", 200), ("LEARNING_RATE", 1e35)):
        monkeypatch.setattr(train_student, name, value)
    with pytest.raises(SystemExit, match="The network of student.pt gives logits that are not finite"):
        train_student.main()
    assert not (tiny / "student.pt").exists()


@pytest.mark.parametrize(
    "script, name, value",
    [
        (train_teacher, "EPOCHS", 0),
        (train_teacher, "EPOCHS", 1.5),
        (train_teacher, "LABEL_SMOOTHING", -0.1),
        (train_teacher, "LABEL_SMOOTHING", 1.1),
        (train_student, "SEED", -1),
        (train_student, "SEED", 2**32 + 5),  # of which numpy makes two words
        (train_student, "LEARNING_RATE", 0),
        (train_student, "LEARNING_RATE", 1e200),
        (train_student, "LEARNING_RATE", float("nan")),
        (distill, "WEIGHT_DECAY", -1e-3),
        (distill, "TEMPERATURE", 0),
        (distill, "TEMPERATURE", 1e5),  # where float32 has too few digits for the loss
        (distill, "TEMPERATURE", float("inf")),
        (distill, "KD_WEIGHT", 1.01),
        (distill, "KD_WEIGHT", True),
        (distill, "KD_WEIGHT", "0.9"),
    ],
)
def test_constants_out_of_range_are_named(script, name, value, tiny, monkeypatch):
    if script is distill:
        train_teacher.main()
    monkeypatch.setattr(script, name, value)
    file = os.path.basename(script.__file__)
    with pytest.raises(SystemExit, match="^" + re.escape(f"{name} = {value!r} in {file} must be")):
        script.main()


class WithState(nn.Linear):
    """Keeps more than tensors in its state, as layers of transformer_engine do."""

    def get_extra_state(self):
        return {"calls": [1, 2], "name": "it"}

    def set_extra_state(self, state):
        assert state == {"calls": [1, 2], "name": "it"}


def with_extra_state(classes):
    return nn.Sequential(nn.Flatten(), WithState(3072, classes))


def initialised_by_numpy(classes):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))
    network[1].weight.data = torch.from_numpy(np.random.randn(classes, 3072) * random.uniform(0.01, 0.02)).float()
    return network


@pytest.mark.parametrize("own", [with_extra_state, initialised_by_numpy])
def test_unusual_networks_are_trained_resumed_and_the_same_with_weight_zero(own, tiny, monkeypatch):
    train_teacher.main()
    monkeypatch.setattr(models, "student", own)
    monkeypatch.setattr(distill, "KD_WEIGHT", 0.0)
    train_student.main()
    undisturbed = models.load_file(tiny / "student.pt", "it")["state_dict"]
    interrupt(monkeypatch, train_student, 9)
    train_student.main()
    distill.main()
    for name in ("student", "distilled"):
        network, checkpoint = models.load_checkpoint(name, "synthetic")
        assert all(
            torch.equal(value, undisturbed[key]) if isinstance(value, torch.Tensor) else value == undisturbed[key]
            for key, value in checkpoint["state_dict"].items()
        ), name
    evaluate.main()


def test_the_random_numbers_of_an_epoch_follow_from_seed_epoch_and_process(tiny, monkeypatch):
    def drawn(seed=0, rank=0):
        monkeypatch.setattr(models, "RANK", rank)
        monkeypatch.setattr(train_student, "SEED", seed)
        numbers, update = [], models.Run.update

        def spy(run, *arguments):
            numbers.append((len(run.curve), torch.rand(1).item(), np.random.rand(), random.random()))
            update(run, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(models.Run, "update", spy)
            patch.setattr(models, "write_atomically", lambda path, write: None)
            train_student.main()
        return numbers

    first = drawn()
    assert drawn() == first and len(first) == 14
    others = [drawn(seed=2**32 - 1), drawn(rank=1)]
    assert len({number for numbers in (first, *others) for _, *three in numbers for number in three}) == 3 * 3 * 14


def test_a_recipe_of_ones_own_is_saved_and_loaded(tiny):
    train, _ = data.load_train("cpu")
    recipe = {"acc": np.float64(0.9), "epochs": 3, "note": "by hand"}
    models.save_checkpoint("teacher", models.teacher(10), train, recipe)
    _, checkpoint = models.load_checkpoint("teacher", "synthetic", train)
    assert checkpoint["recipe"] == recipe | {"images": train.fingerprint}


def test_other_passes_over_the_data_do_not_change_the_weights(tiny, monkeypatch):
    """One seed, one result: also where a hold-out is looked at, or images are drawn or predicted in between."""
    train_student.main()
    before = weights(tiny / "student.pt")
    update = models.Run.update

    def distracted(run, loss, logits, labels):
        update(run, loss, logits, labels)
        models.predict(run.network, run.train)
        run.network.train()
        next(data.batches(run.train, 10, len(run.curve) + 7, 3))

    monkeypatch.setattr(models.Run, "update", distracted)
    train_student.main()
    assert same(weights(tiny / "student.pt"), before)
