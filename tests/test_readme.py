"""The README's own code, as it stands there."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, same
from PIL import Image, PngImagePlugin
from torch import nn
from torchvision.transforms.functional import to_pil_image

import data
import distill
import models
import train_student
import train_teacher

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_under(heading, number=0):
    """A block of Python under a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[number]


@pytest.mark.filterwarnings("error", "ignore:The given buffer is not writable")  # torch 2.11's own, in export.load
def test_the_section_that_uses_the_student(tiny, tmp_path, monkeypatch, capsys):
    train_teacher.main()
    distill.main()
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    to_pil_image(torch.rand(3, 400, 700)).save(pictures / "a.jpg")
    to_pil_image(torch.rand(4, 50, 70)).save(pictures / "b.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    to_pil_image(torch.rand(3, 900, 70)).save(pictures / "c.jpg", exif=turned)
    (pictures / "d.DS_Store").write_bytes(b"what a Mac leaves")
    (pictures / "e folder").mkdir()
    Image.fromarray(np.full((40, 40), 30_000, np.uint16)).save(pictures / "f.png")
    text = PngImagePlugin.PngInfo()
    text.add_text("notes", "x" * 2_000_000, zip=True)
    to_pil_image(torch.rand(3, 50, 70)).save(pictures / "g.png", pnginfo=text)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 2**20)
    monkeypatch.chdir(tmp_path)
    exec(code_under("Use the student"), {})
    capsys.readouterr()
    exec(code_under("Use the student", 1), {})
    monkeypatch.undo()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a.jpg", "b.png", "c.jpg", "The", "The", "The", "g.png"]
    for line, name in zip(lines[3:6], ("d.DS_Store", "e folder", "f.png")):
        assert line.startswith(f"The image {pictures.relative_to(tmp_path) / name} cannot be read: ")
    for line in (*lines[:3], lines[6]):
        shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.1
    monkeypatch.setenv("CHECKPOINT_DIR", str(tiny.parent))
    monkeypatch.setattr(models, "STUDENT_WIDTHS", (4, 4, 6, 8))
    student, checkpoint = models.load_checkpoint("distilled", "synthetic")
    files = {"about": ""}
    exported = torch.export.load(tmp_path / "student.pt2", extra_files=files).module()
    assert json.loads(files["about"]) == {"classes": checkpoint["classes"], "size": 32}
    for count in (3, 8):
        pictures = torch.rand(count, 3, 32, 32)
        assert torch.allclose(exported(pictures), student(pictures), atol=1e-5)


def test_a_network_of_ones_own(tiny, monkeypatch):
    monkeypatch.setattr(models, "student", lambda classes: torchvision.models.resnet18(num_classes=classes))
    monkeypatch.setattr(train_student, "EPOCHS", 1)
    monkeypatch.setattr(train_student, "BATCH_SIZE", 100)
    train_student.main()
    train, _ = data.load_train("cpu")
    network, _ = models.load_checkpoint("student", "synthetic", train)
    assert type(network).__name__ == "ResNet"
    with pytest.raises(SystemExit, match="other classes"):
        models.load_checkpoint("student", "synthetic", replace(train, classes=("cat", "dog")))


def test_a_teacher_with_weights_of_imagenet(tiny, monkeypatch):
    """With random weights: those of ImageNet would have to be downloaded."""
    defined = {"nn": nn}
    code = code_under("Your own images, network or teacher")
    exec(code.replace("torchvision.models.ResNet18_Weights.DEFAULT", "None"), defined)
    monkeypatch.setattr(models, "teacher", defined["teacher"])
    monkeypatch.setattr(data, "TRAIN_IMAGES", 40)
    for name, value in (("EPOCHS", 1), ("BATCH_SIZE", 20), ("LEARNING_RATE", 0.01)):
        monkeypatch.setattr(train_teacher, name, value)
    train_teacher.main()
    network, _ = models.load_checkpoint("teacher", "synthetic")
    assert network[0](torch.rand(2, 3, 32, 32)).shape[2:] == (128, 128) and network[2].fc.out_features == 10


def test_the_optimizer_for_transformers(tiny, monkeypatch):
    (line,) = re.findall(r"`(torch.optim.AdamW[^`]*)`", README)
    monkeypatch.setattr(models, "Muon", lambda student, *_: eval(line, {"torch": torch, "student": student}))
    train_student.main()
    recipe = models.load_file(tiny / "student.pt", "it")["recipe"]
    assert recipe["optimizer"] == "AdamW" and recipe["initial_lr of group 0"] == 3e-3


def test_a_teacher_from_elsewhere(tiny, tmp_path, monkeypatch):
    def teacher(classes):
        normalise = torchvision.transforms.Normalize((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
        return nn.Sequential(normalise, torchvision.models.resnet18(num_classes=classes))

    monkeypatch.setattr(models, "teacher", teacher)
    torch.save(models.teacher(10)[-1].state_dict(), tmp_path / "my_weights.pt")
    monkeypatch.chdir(tmp_path)
    exec(code_under("Your own images, network or teacher", 1), {})
    network, _ = models.load_checkpoint("teacher", "synthetic")
    assert same(network[-1].state_dict(), torch.load(tmp_path / "my_weights.pt", weights_only=True))
    monkeypatch.setattr(distill, "EPOCHS", 1)
    distill.main()
    assert (tiny / "distilled.pt").exists()
