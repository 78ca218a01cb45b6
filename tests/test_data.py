"""data.py: loading, the hold-out, views, batches."""

import os
import re
import shutil
import struct
import sys
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import data
import distill
import evaluate
import models
import train_student
import train_teacher


def image_set(count=30, classes=3):
    rng = np.random.default_rng(7)
    images = torch.from_numpy(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
    names = tuple(str(number) for number in range(classes))
    return data.ImageSet("x", names, images, torch.arange(count) % classes, torch.arange(count), "")


def by_position(split, *arguments):
    """All images of an epoch in the split's own order."""
    drawn = [(images, positions) for images, _, positions in data.batches(split, *arguments)]
    images, positions = torch.cat([d[0] for d in drawn]), torch.cat([d[1] for d in drawn])
    assert sorted(positions.tolist()) == list(range(len(split)))  # each image exactly once
    return images[positions.argsort()]


def test_views_against_a_naive_loop():
    split = image_set()
    shown, seen = by_position(split, 7, 5, 11), set()
    for i in range(len(split)):
        padded = np.pad(split.images[i].numpy(), ((2, 2), (2, 2), (0, 0)), mode="reflect")
        views = {
            (down, right, mirrored): padded[down : down + 32, right : right + 32][:, :: -1 if mirrored else 1]
            for down in range(5)
            for right in range(5)
            for mirrored in (False, True)
        }
        pixels = (255 * shown[i]).round().byte().permute(1, 2, 0).numpy()
        (view,) = [view for view, expected in views.items() if np.array_equal(pixels, expected)]
        seen.add(view)
    assert len(seen) > 15  # of 30 images in 50 views


def test_views_are_the_same_in_any_batch():
    split = image_set()
    shown = by_position(split, 30, 3, 0)
    for batch_size in (1, 7, 11):
        assert torch.equal(by_position(split, batch_size, 3, 0), shown)
    for epoch, seed in ((4, 0), (3, 1)):
        assert not torch.equal(by_position(split, 30, epoch, seed), shown)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_views_are_the_same_on_cuda():
    split = image_set()
    on_cuda = replace(split, **{k: getattr(split, k).cuda() for k in ("images", "labels", "index")})
    shown = by_position(on_cuda, 7, 3, 1).cpu()  # a GPU divides by 255 with another rounding
    torch.testing.assert_close(shown, by_position(split, 7, 3, 1), atol=1e-6, rtol=0)


def test_the_views_of_an_image_follow_from_seed_epoch_and_image_alone():
    for few, many in zip(data.draw_views(0, 3, 10), data.draw_views(0, 3, 1001)):
        assert torch.equal(few, many[:10])
    for other in ((1, 3), (0, 4)):
        assert all(not torch.equal(a, b) for a, b in zip(data.draw_views(0, 3, 500), data.draw_views(*other, 500)))


def test_all_shifts_occur_and_every_second_epoch_mirrors():
    rows, columns = data.draw_views(0, 0, 5000)
    mirrored = columns[:, 10] > columns[:, 20]
    down, right = rows[:, 16] - 16, torch.where(mirrored[:, None], columns.flip(1), columns)[:, 16] - 16
    counts = torch.zeros(5, 5).index_put((down + 2, right + 2), torch.ones(5000), accumulate=True)
    assert counts.min() > 100 and counts.max() < 300  # 200 expected of each
    assert 2300 < mirrored.sum() < 2700
    for epoch, expected in ((1, ~mirrored), (2, mirrored)):
        columns = data.draw_views(0, epoch, 5000)[1]
        assert torch.equal(columns[:, 10] > columns[:, 20], expected)


def test_a_held_out_image_changes_no_other_images_views(tiny, monkeypatch):
    whole, none = data.load_train("cpu")
    assert none is None
    monkeypatch.setattr(data, "HOLD_OUT", 40)
    kept, held = data.load_train("cpu")
    assert torch.equal(by_position(kept, 13, 2, 5), by_position(whole, 200, 2, 5)[kept.index])
    assert sorted(kept.index.tolist() + held.index.tolist()) == list(range(200))


@pytest.mark.parametrize("word", [data.SETTING_ASIDE, data.CHOOSING])
def test_a_choice_takes_its_share_of_every_class(word):
    labels = np.repeat([0, 1, 2], [100, 50, 7])
    for count in (1, 10, 50, 157):
        chosen = data.choose(labels, count, word)
        assert len(set(chosen.tolist())) == count
        taken = np.bincount(labels[chosen], minlength=3)
        assert np.all(np.abs(taken - np.array([100, 50, 7]) * count / 157) <= 1)
        assert np.array_equal(chosen, data.choose(labels, count, word))


def test_so_many_training_images_are_chosen_from_those_that_are_not_set_aside(tiny, monkeypatch):
    whole, _ = data.load_train("cpu")
    monkeypatch.setattr(data, "HOLD_OUT", 40)
    _, held_before = data.load_train("cpu")
    monkeypatch.setattr(data, "TRAIN_IMAGES", 60)
    few, held = data.load_train("cpu")
    assert len(few) == 60 and torch.equal(held.index, held_before.index)
    assert few.fingerprint not in (whole.fingerprint, held_before.fingerprint)
    assert not set(few.index.tolist()) & set(held.index.tolist())
    assert torch.equal(few.images, whole.images[few.index]) and torch.equal(few.labels, whole.labels[few.index])
    assert torch.equal(by_position(few, 13, 2, 5), by_position(whole, 200, 2, 5)[few.index])  # the same views
    assert torch.equal(data.load_train("cpu")[0].index, few.index)
    monkeypatch.setattr(data, "HOLD_OUT", 0)
    assert set(data.load_train("cpu")[0].index.tolist()) != set(held.index.tolist())


def test_without_mirror_no_view_is_mirrored(monkeypatch):
    monkeypatch.setattr(data, "MIRROR", False)
    for epoch in (0, 1):
        _, columns = data.draw_views(0, epoch, 500)
        assert (columns[:, 10] < columns[:, 20]).all()


@pytest.mark.parametrize("size", [16, 50, 96])
def test_a_folder_of_images_of_any_size(size, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SIZE", size)
    monkeypatch.setattr(models, "TEACHER_WIDTHS", (6, 8, 12, 16))
    monkeypatch.setattr(models, "STUDENT_WIDTHS", (4, 4, 6, 8))
    monkeypatch.setenv("DATASET", str(folder))
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path))
    train, _ = data.load_train("cpu")
    assert train.images.shape == (36, size, size, 3)
    expected = Image.open(folder / "train" / "dark" / "0.png").resize((size, size))
    assert np.array_equal(train.images[0].numpy(), np.array(expected))
    shown = by_position(train, 7, 1, 0)
    assert shown.shape == (36, 3, size, size) and shown.is_contiguous(memory_format=torch.channels_last)
    for script in (train_teacher, train_student, distill):
        monkeypatch.setattr(script, "EPOCHS", 1)
        monkeypatch.setattr(script, "BATCH_SIZE", 18)
        script.main()
    evaluate.main()
    monkeypatch.setattr(data, "SIZE", 32)
    message = rf"teacher.pt is for images of {size}x{size} pixels, but SIZE = 32 in data.py"
    for script in (distill, evaluate):
        with pytest.raises(SystemExit, match=message):
            script.main()


@pytest.mark.parametrize("dataset", data.BUILT_IN)
def test_another_size_is_for_folders_of_images(dataset, monkeypatch):
    monkeypatch.setattr(data, "SIZE", 64)
    monkeypatch.setenv("DATASET", dataset)
    message = f"^SIZE = 64 in data.py is for folders of images: {dataset} needs SIZE = 32.$"
    with pytest.raises(SystemExit, match=message):
        data.load_train("cpu")


def test_evaluation_batches_are_plain_and_in_order():
    split = image_set()
    drawn = list(data.batches(split, 8))
    positions = torch.cat([positions for _, _, positions in drawn])
    assert positions.tolist() == list(range(30))
    shown = torch.cat([images for images, _, _ in drawn])
    assert torch.equal(shown, split.images.permute(0, 3, 1, 2) / 255) and shown.max() == 1
    assert torch.equal(torch.cat([labels for _, labels, _ in drawn]), split.labels)


def test_batches_are_channels_last_nearly_equal_and_reordered_every_epoch():
    split = image_set()
    drawn = list(data.batches(split, 8, 0, 1))
    assert [len(labels) for _, labels, _ in drawn] == [8, 8, 7, 7]
    assert len(drawn) == data.batch_count(30, 8)
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _, _ in drawn)
    orders = [
        torch.cat([p for *_, p in data.batches(split, 8, epoch, seed)]).tolist()
        for epoch, seed in ((0, 1), (1, 1), (0, 2))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_synthetic_images_are_always_the_same_and_the_splits_differ(tiny):
    images, labels, classes = data.synthetic("train")
    again, *_ = data.synthetic("train")
    test, test_labels, _ = data.synthetic("test")
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    assert np.array_equal(images, again)
    assert not np.array_equal(images[:100], test)
    assert len(classes) == 10 and np.bincount(labels).min() > 8 and np.bincount(test_labels, minlength=10).min() > 3


def test_synthetic_images_do_not_depend_on_how_many_are_drawn(tiny):
    images, labels, _ = data.synthetic("train")
    data.SYNTHETIC_IMAGES["train"] = 37
    few, few_labels, _ = data.synthetic("train")
    assert np.array_equal(few, images[:37]) and np.array_equal(few_labels, labels[:37])
    assert data.fingerprint(few, few_labels) == "c33a64ec513205e0"  # those of which the figures are


def test_synthetic_images_do_not_depend_on_the_processor(copy):
    """numpy computes with other instructions where some are switched off; names that it does not know are ignored."""
    code = "import data; print(data.fingerprint(*data.synthetic('train')[:2]))"
    copy.edit("data.py", SYNTHETIC_IMAGES=data.SYNTHETIC_IMAGES)
    other = copy.run("-c", code, NPY_DISABLE_CPU_FEATURES="X86_V3 AVX2 FMA3")
    assert other.returncode == 0, other.stderr
    assert other.stdout.strip() == data.fingerprint(*data.synthetic("train")[:2])


def test_folder_of_images(folder, monkeypatch):
    monkeypatch.setenv("DATASET", str(folder))
    train, _ = data.load_train("cpu")
    test = data.load_test("cpu")
    assert re.fullmatch("my images-[0-9a-f]{6}", train.dataset) and train.classes == ("dark", "grey", "light")
    assert train.images.shape == (36, 32, 32, 3) and test.images.shape == (12, 32, 32, 3)
    means = [train.images[train.labels == label].float().mean().item() for label in range(3)]
    assert means == pytest.approx([40, 120, 200], abs=3)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_folders_are_told_apart_by_their_whole_path(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    shutil.copytree(folder, tmp_path / "other" / folder.name)
    names = []
    for path in (folder, tmp_path / "link", tmp_path / "other" / folder.name):
        monkeypatch.setenv("DATASET", str(path))
        names.append(data.dataset_name())
    assert names[0] == names[1] != names[2]
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("DATASET", folder.name)
    assert data.dataset_name() == names[2]


def test_the_fingerprint_is_of_images_labels_and_classes(tiny, monkeypatch):
    images, labels, classes = data.synthetic("train")
    prints = []
    for change in (
        (images, labels, classes),
        (images, labels, classes),
        (images[::-1].copy(), labels, classes),
        (images, labels[::-1], classes),
        (images, labels, classes[::-1]),
        (images[1:], labels[1:], classes),
    ):
        monkeypatch.setattr(data, "synthetic", lambda split, change=change: change)
        prints.append(data.load_train("cpu")[0].fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 5
    assert data.load_test("cpu").fingerprint is None


def test_the_label_of_a_synthetic_image_is_uncertain_to_a_known_degree(tiny, monkeypatch):
    """The best possible classifier's doubt is really there: labels are drawn with the chances of the flower itself."""
    monkeypatch.setattr(data, "SYNTHETIC_IMAGES", {"train": 4000, "test": 100})
    draws, chance_of = [], data.synthetic_chance

    def chances(share, sure=None):
        draws.append((chance_of(share), share))
        return draws[-1][0] if sure is None else sure

    numbers = []  # of petals, 0 for three; two classes, filled and outlined, for each
    for sure in (None, 0.0, 1.0):  # as it is; always the lower number; always the higher one
        monkeypatch.setattr(data, "synthetic_chance", lambda share, sure=sure: chances(share, sure))
        _, labels, classes = data.synthetic("train")
        numbers.append(labels // 2)
    (chance, share), (drawn, lower, higher) = np.array(draws[:4000]).T, numbers
    assert share.min() >= 0 and share.max() <= 1 and (higher == lower + 1).all()
    assert ((drawn == lower) | (drawn == higher)).all() and drawn.min() == 0 and drawn.max() == 4
    likeliest = np.maximum(chance, 1 - chance)
    best = np.where(chance > 0.5, higher, lower)
    assert (best == drawn).mean() == pytest.approx(likeliest.mean(), abs=0.02)
    assert 0.85 < likeliest.mean() < 0.95
    unsure = likeliest < 0.7
    assert 0.05 < unsure.mean() < 0.5
    assert (best == drawn)[unsure].mean() == pytest.approx(likeliest[unsure].mean(), abs=0.05)
    assert [name.split()[0] for name in classes] == [str(3 + number // 2) for number in range(10)]


def break_nothing_there(root):
    return root.parent / "elsewhere", "^DATASET = '.*elsewhere' does not exist"


def break_a_file(root):
    return root / "train" / "dark" / "3.png", "must be a folder with train/<class>"


def break_no_test(root):
    (root / "test").rename(root / "validation")
    return root, "must be a folder with train/<class>.*with the same classes"


def break_classes_differ(root):
    (root / "test" / "dark").rename(root / "test" / "black")
    return root, "same classes.*'black', 'dark'"


def break_empty_class(root):
    for file in (root / "train" / "dark").iterdir():
        file.unlink()
    return root, "only train or only test has images of .'dark'"


def break_empty_test_class(root):
    for file in (root / "test" / "dark").iterdir():
        file.unlink()
    return root, "only train or only test has images of .'dark'"


def break_one_class(root):
    for part in ("train", "test"):
        for name in ("dark", "grey"):
            (root / part / name).rename(root / f"{part} {name}")
    return root, "at least two"


def break_image(root):
    (root / "train" / "dark" / "3.png").write_bytes(b"not an image")
    return root, "3.png.*cannot be read"


def break_by_size(root):
    Image.new("1", (20_000, 20_000)).save(root / "train" / "dark" / "3.png")  # 50 kB on the disk, 1.2 GB in memory
    return root, "3.png.*cannot be read.*exceeds limit.* shrink or remove it.$"


def break_by_half(root):
    Image.effect_noise((200, 200), 50).save(root / "train" / "dark" / "3.jpg")
    whole = (root / "train" / "dark" / "3.jpg").read_bytes()
    (root / "train" / "dark" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    return root, "3.jpg.*cannot be read"


def break_by_depth(root):
    Image.fromarray(np.full((40, 40), 30_000, np.uint16)).save(root / "train" / "dark" / "3.png")
    return root, "3.png.*cannot be read: it has more than 8 bits per channel"


def break_by_depth_in_tiff(root):
    Image.fromarray(np.full((40, 40), 0.5, np.float32)).save(root / "train" / "dark" / "3.tif")
    return root, "3.tif.*cannot be read: it has more than 8 bits per channel"


def break_by_depth_in_pgm(root):
    (root / "train" / "dark" / "3.pgm").write_bytes(b"P5 2 2 65535\n" + bytes(8))
    return root, "3.pgm.*cannot be read: it has more than 8 bits per channel"


def break_by_a_link_to_nothing(root):
    (root / "train" / "dark" / "3.png").unlink()
    (root / "train" / "dark" / "3.png").symlink_to(root / "nothing.png")
    return root, "3.png.*cannot be read"


def break_other_files(root):
    for file in (root / "train" / "dark").iterdir():
        file.rename(file.with_suffix(".txt"))
    return root, "dark"


DAMAGES = [
    break_by_half,
    break_by_depth,
    break_by_depth_in_tiff,
    break_by_depth_in_pgm,
    break_by_a_link_to_nothing,
    break_other_files,
    break_nothing_there,
    break_a_file,
    break_no_test,
    break_classes_differ,
    break_empty_class,
    break_empty_test_class,
    break_one_class,
    break_image,
    break_by_size,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_no_dataset_is_named(damage, folder, monkeypatch):
    dataset, message = damage(folder)
    monkeypatch.setenv("DATASET", str(dataset))
    with pytest.raises(SystemExit, match=message):
        data.load_train("cpu")


def grey(path, shade):
    Image.new("L", (40, 30), shade).save(path)


def black_and_white(path, shade):
    Image.new("1", (40, 30), shade > 127).save(path)


def palette(path, shade):
    Image.new("RGB", (40, 30), (shade,) * 3).quantize(4).save(path)


def palette_with_transparency(path, shade):
    picture = Image.new("P", (40, 30), 1)
    picture.putpalette([0, 0, 0, 0, 255, 0] + [2 * shade - 255] * 3)
    picture.paste(2, (0, 0, 40, 30))
    picture.save(path, transparency=b"\xff\x00\x80")


def alpha(path, shade):
    """Half transparent, so that it looks lighter than it is, on white."""
    Image.new("RGBA", (40, 30), (2 * shade - 255,) * 3 + (128,)).save(path)


def alpha_of_nothing(path, shade):
    """What a transparent pixel hides is not seen."""
    picture = Image.new("RGBA", (32, 32), (0, 255, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 32, round(32 * (255 - shade) / 255)))
    picture.save(path)


def cmyk(path, shade):
    Image.new("CMYK", (40, 30), (0, 0, 0, 255 - shade)).save(path.with_suffix(".jpg"))


def colours_of_16_bits(path, shade):
    """A PNG by hand: Pillow reads such files and writes none."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + struct.pack(">H", shade * 257) * 3 * 4) * 4
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def animated(path, shade):
    frames = [Image.new("RGB", (40, 30), (other,) * 3) for other in (shade, 0, 255)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def pages(path, shade):
    frames = [Image.new("RGB", (40, 30), (other,) * 3) for other in (shade, 0, 255)]
    frames[0].save(path.with_suffix(".tiff"), save_all=True, append_images=frames[1:])


def one_pixel(path, shade):
    Image.new("RGB", (1, 1), (shade,) * 3).save(path)


def one_row(path, shade):
    Image.new("RGB", (3000, 1), (shade,) * 3).save(path)


def many_pixels(path, shade):
    Image.new("L", (9000, 9000), shade).save(path)


def gif(path, shade):
    Image.new("L", (40, 30), shade).save(path.with_suffix(".gif"))


def in_a_folder_of_its_own(path, shade):
    path.with_suffix("").mkdir()
    grey(path.with_suffix("") / "inner.png", shade)


def under_another_name(path, shade):
    grey(path.with_name("mein schönes Bild, nº 3 (日本).PNG"), shade)


ODD = [
    grey,
    black_and_white,
    palette,
    palette_with_transparency,
    alpha,
    alpha_of_nothing,
    cmyk,
    colours_of_16_bits,
    animated,
    pages,
    one_pixel,
    one_row,
    many_pixels,
    gif,
    in_a_folder_of_its_own,
    under_another_name,
]


@pytest.mark.parametrize("make", ODD)
def test_odd_pictures_are_read_as_they_look(make, folder, monkeypatch):
    name = folder / "train" / "grün & grau"
    for part in ("train", "test"):
        (folder / part / "grey").rename(folder / part / name.name)
    (name / "3.png").unlink()
    make(name / "3.png", 200)
    monkeypatch.setenv("DATASET", str(folder))
    train, _ = data.load_train("cpu")
    assert train.classes == ("dark", name.name, "light") and len(train) == 36
    means = train.images.float().mean((1, 2, 3))
    odd = means[(train.labels == 1)][(means[train.labels == 1] - 120).abs().argmax()].item()
    assert odd == pytest.approx(255 if make is black_and_white else 200, abs=3)


def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path):
    picture = Image.new("RGB", (64, 32), "black")
    picture.paste((255, 255, 255), (0, 0, 32, 32))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: left becomes top
    picture.save(tmp_path / "photograph.png", exif=exif)
    read = data.read_image(tmp_path / "photograph.png")
    assert read[:14].min() > 250 and read[18:].max() < 5


def test_an_opaque_picture_keeps_its_values(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    assert np.array_equal(data.read_image(tmp_path / "opaque.png"), pixels)


def test_what_is_hidden_is_no_class_and_no_image(folder, monkeypatch, capsys):
    for hidden in (folder / "train" / ".ipynb_checkpoints", folder / "train" / "dark" / ".cache"):
        hidden.mkdir()
        grey(hidden / "1.png", 0)
    (folder / "train" / "dark" / "._1.png").write_bytes(b"what a Mac leaves")
    monkeypatch.setenv("DATASET", str(folder))
    train, _ = data.load_train("cpu")
    assert train.classes == ("dark", "grey", "light") and len(train) == 36
    assert capsys.readouterr().out == ""


def test_files_of_other_endings_are_counted(folder, monkeypatch, capsys):
    (folder / "train" / "dark" / "notes.txt").write_text("three of these are mine")
    (folder / "test" / "light" / "notes.txt").write_text("none")
    monkeypatch.setenv("DATASET", str(folder))
    data.load_train("cpu")
    assert capsys.readouterr().out == f"Left out because of their endings: 2 files in {folder}, such as notes.txt.\n"


def test_a_folder_of_endings_that_cannot_be_read_says_so(folder, monkeypatch, capsys):
    for file in folder.glob("*/*/*.png"):
        file.rename(file.with_suffix(".unknown"))
    monkeypatch.setenv("DATASET", str(folder))
    with pytest.raises(SystemExit, match="must be a folder with"):
        data.load_train("cpu")
    assert "Left out because of their endings: 48 files" in capsys.readouterr().out


def test_what_a_nas_adds_is_no_class_and_no_image(folder, monkeypatch, capsys):
    for added in ("train/@eaDir", "test/@eaDir", "train/#recycle", "train/dark/@eaDir", "train/dark/@eaDir/3.png"):
        (folder / added).mkdir()
        grey(folder / added / "SYNOPHOTO_THUMB_M.jpg", 0)
    monkeypatch.setenv("DATASET", str(folder))
    train, _ = data.load_train("cpu")
    assert train.classes == ("dark", "grey", "light") and len(train) == 36
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_the_whole_and_a_class_may_be_links(folder, tmp_path, monkeypatch):
    (folder / "train" / "dark").rename(tmp_path / "dark")
    (folder / "train" / "dark").symlink_to(tmp_path / "dark")
    (tmp_path / "data").symlink_to(folder)
    for path in (folder, tmp_path / "data"):
        monkeypatch.setenv("DATASET", str(path))
        train, _ = data.load_train("cpu")
        assert train.classes == ("dark", "grey", "light") and train.labels.bincount().tolist() == [12, 12, 12]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
@pytest.mark.parametrize("target", ["..", "../..", "../grey", "../../test", "../../..", "."])
def test_a_link_to_a_folder_below_a_class_is_named_and_not_followed(target, folder, monkeypatch, capsys):
    (folder / "train" / "dark" / "again").symlink_to(target)
    monkeypatch.setenv("DATASET", str(folder))
    train, _ = data.load_train("cpu")
    assert train.labels.bincount().tolist() == [12, 12, 12]
    assert capsys.readouterr().out == f"Left out because of their endings: 1 files in {folder}, such as again.\n"


def test_images_are_read_by_threads_in_their_order(folder, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    paths = [path for path in sorted((folder / "train").glob("*/*.png"))]
    images = data.read_images(paths, "reading")
    assert images.shape == (36, 32, 32, 3)
    assert all(np.array_equal(image, data.read_image(path)) for image, path in zip(images, paths))


def test_whole_sets_of_images_are_not_copied(folder, monkeypatch):
    read = []
    whole = data.read_images
    monkeypatch.setattr(data, "read_images", lambda *given: read.append(whole(*given)) or read[-1])
    monkeypatch.setenv("DATASET", str(folder))
    train, _ = data.load_train("cpu")
    assert train.images.data_ptr() == read[0].ctypes.data


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit])
def test_reading_ends_soon_after_a_failure(failure, folder, monkeypatch):
    started, paths = [], sorted((folder / "train").glob("*/*.png")) * 50

    def read(path):
        started.append(path)
        time.sleep(0.01)
        if len(started) == 10:
            raise failure("ended")
        return np.zeros((32, 32, 3), np.uint8)

    monkeypatch.setattr(data, "read_image", read)
    with pytest.raises(failure):
        data.read_images(paths, "reading")
    assert len(started) < 100


def test_the_order_of_the_files_is_by_folder_and_name(folder, monkeypatch):
    dark = folder / "train" / "dark"
    for name in ("b/2.png", "b/1.png", "a/3.png", "c.png", "b.png"):
        (dark / name).parent.mkdir(exist_ok=True)
        grey(dark / name, 0)
    names = [str(path.relative_to(dark)) for path in data._files_below(dark, "**/*")]
    assert names == [str(path.relative_to(dark)) for path in sorted(dark.rglob("*.png"))]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere all names are text")
def test_a_class_whose_name_is_no_text_is_evaluated(folder, tmp_path, monkeypatch):
    for part in ("train", "test"):
        (folder / part / "dark").rename(folder / part / os.fsdecode(b"caf\xe9"))
    monkeypatch.setenv("DATASET", str(folder))
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path))
    for script in (train_teacher, train_student, distill):
        monkeypatch.setattr(script, "EPOCHS", 1)
        script.main()
    evaluate.main()
    assert data.load_test("cpu").classes[0] == os.fsdecode(b"caf\xe9")


def test_a_large_photograph_is_read_as_a_small_one(tmp_path):
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((1200, 900))
    smooth.save(tmp_path / "photograph.jpg", quality=95)
    plain = Image.open(tmp_path / "photograph.jpg").resize((32, 32))
    apart = data.read_image(tmp_path / "photograph.jpg").astype(int) - np.array(plain)
    assert np.abs(apart).max() <= 3


def test_a_picture_that_holds_much_text_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("notes", "x" * 2_000_000, zip=True)
    Image.new("L", (40, 30), 200).save(tmp_path / "a.png", pnginfo=text)
    assert (data.read_image(tmp_path / "a.png") == 200).all()


def test_the_names_of_the_datasets_are_given(monkeypatch):
    monkeypatch.setenv("DATASET", "cifar-10")
    message = "^DATASET = 'cifar-10' does not exist. It can also be cifar10, cifar100, synthetic.$"
    with pytest.raises(SystemExit, match=message):
        data.load_train("cpu")
    monkeypatch.setenv("DATASET", "synthetic/")  # as a shell completes it
    assert data.dataset_name() == "synthetic"


@pytest.mark.parametrize("by", ["environment", "constant"])
def test_a_path_that_begins_with_the_home_folder(by, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # on Windows
    for module, name in ((data, "DATASET"), (data, "DATA_DIR"), (models, "CHECKPOINT_DIR")):
        monkeypatch.delenv(name, raising=False)
        if by == "environment":
            monkeypatch.setenv(name, f"~/{folder.name}")
        else:
            monkeypatch.setattr(module, name, f"~/{folder.name}")
    assert len(data.load_train("cpu")[0]) == 36
    assert data.path_from("DATA_DIR", data.DATA_DIR) == folder and models.checkpoint_dir("x") == folder / "x"


def test_a_path_with_the_name_of_an_unknown_user_is_reported_as_missing(monkeypatch):
    monkeypatch.setenv("DATASET", "~no-such-user/images")
    with pytest.raises(SystemExit, match="^DATASET = '~no-such-user/images' does not exist"):
        data.load_train("cpu")


@pytest.mark.parametrize(
    "hold_out, train_images", [(191, 0), (200, 0), (200, 1), (1000, 0), (0, 3), (0, 201), (100, 101)]
)
def test_what_is_set_aside_and_chosen_leaves_an_image_of_every_class(hold_out, train_images, tiny, monkeypatch):
    monkeypatch.setattr(data, "HOLD_OUT", hold_out)
    monkeypatch.setattr(data, "TRAIN_IMAGES", train_images)
    named = f"^HOLD_OUT = {hold_out} and TRAIN_IMAGES = {train_images} in data.py .* of 200 images"
    with pytest.raises(SystemExit, match=named):
        data.load_train("cpu")
