"""The images: which ones, held whole on the device as one uint8 tensor, and batches of random views of them.

A *view* of an image is one shifted and perhaps mirrored copy of it. Which view of image i is shown in epoch e follows
from (SEED, e, i) alone: not from the batch or the device. So a student that learns alone and one that learns from a
teacher see the same views in the same order.
"""

import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm.auto import tqdm

DATASET = "cifar10"  # "cifar10", "cifar100", "synthetic", or a folder with train/<class>/* and test/<class>/*
DATA_DIR = "data"  # downloads; beside this file unless absolute. The environment's DATASET and DATA_DIR come first
HOLD_OUT = 0  # training images set aside to tune on, reported after each epoch; 0 trains on all of them
TRAIN_IMAGES = 0  # how many of the other training images to train on, each class in its share; 0 takes all of them
SIZE = 32  # height and width of all images, pixels; another value is for folders of images
SHIFT = 2  # pixels by which a view may be moved up, down, left and right
MIRROR = True  # show every image mirrored in every second epoch; False for digits, arrows and text

SYNTHETIC_IMAGES = {"train": 3000, "test": 10000}  # few to learn from, where a good teacher helps most; many to measure

# The first number of what seeds each kind of chance, so that no two draw the same numbers.
ORDER, SHIFTS, MIRRORS, SETTING_ASIDE, DRAWING, CHOOSING, TRAINING = range(1, 8)


# ---- Processes and paths: no matter of images ------------------------------------------------------------------------

# This process's number, and how many processes there are; torchrun sets both.
LAUNCHED = torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
BAR = {"leave": False, "disable": True if RANK else None}  # of tqdm's progress bars: None shows them on a terminal only


def path_from(variable, constant):
    """The path in an environment variable, else in the constant of that name, which is relative to this file."""
    expand = os.path.expanduser  # unlike Path's, it leaves the name of an unknown user as it is
    path = os.environ.get(variable) or Path(__file__).parent / expand(str(constant))
    return Path(expand(path))


# ---- Loading ---------------------------------------------------------------------------------------------------------

BUILT_IN = {"cifar10": CIFAR10, "cifar100": CIFAR100, "synthetic": None}  # what DATASET can name
ENDINGS = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}  # of images


@dataclass
class ImageSet:
    """One split of a dataset, whole, on one device.

    images: uint8 [N, SIZE, SIZE, 3]. labels: int64 [N], -1 for none. index: int64 [N], each image's number in the whole
    split, which its views follow from. fingerprint: of the training images and their labels, which a hold-out has too;
    None for test images.
    """

    dataset: str
    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    index: Tensor
    fingerprint: str | None

    def __len__(self):
        return len(self.labels)


def load_train(device):
    """The training images (TRAIN_IMAGES of those not held out) and the hold-out (None if HOLD_OUT is 0)."""
    images, labels, classes = _read("train")
    held_out = choose(labels, HOLD_OUT, SETTING_ASIDE)
    chosen = np.setdiff1d(np.arange(len(labels)), held_out)
    if TRAIN_IMAGES:
        count = min(TRAIN_IMAGES, len(chosen))
        chosen = np.sort(chosen[choose(labels[chosen], count, CHOOSING)])
    if len(chosen) < TRAIN_IMAGES or len(set(labels[chosen])) < len(classes):
        asked = f"HOLD_OUT = {HOLD_OUT} and TRAIN_IMAGES = {TRAIN_IMAGES} in data.py leave too few"
        raise SystemExit(f"{asked}: of {len(images)} images one at least of every class must be left to train on.")
    content = fingerprint(images[chosen], labels[chosen], classes)
    train = _image_set(images, labels, classes, chosen, device, content)
    hold_out = None
    if HOLD_OUT:
        hold_out = _image_set(images, labels, classes, held_out, device, content)
    return train, hold_out


def add_unlabelled(train):
    """The training images, and after them those without a label, with labels of -1.

    Of a built-in set these are what TRAIN_IMAGES leaves (never the hold-out), of a folder of images all in
    <DATASET>/unlabelled, at any depth. Ends the script with one sentence where there are none.
    """
    folder = path_from("DATASET", DATASET) / "unlabelled"
    if train.dataset in BUILT_IN:
        images, labels, _ = _read("train")
        held_out = choose(labels, HOLD_OUT, SETTING_ASIDE)
        index = np.setdiff1d(np.arange(len(labels)), np.concatenate([held_out, train.index.cpu()]))
        images = images[index]
        way_out = "set TRAIN_IMAGES in data.py"
    else:
        paths = [path for path in _files_below(folder, "**/*") if path.suffix.lower() in ENDINGS]
        images = read_images(paths, f"reading {folder}")
        index = np.arange(len(paths))
        way_out = f"put some into {folder}"
    if not len(images):
        missing = f"{train.dataset} has no images without a label"
        raise SystemExit(f"UNLABELLED = True in distill.py, but {missing}: {way_out}.")
    parts = {"images": images, "labels": np.full(len(images), -1), "index": index}
    for name, part in parts.items():
        whole = getattr(train, name)
        parts[name] = torch.cat([whole, torch.from_numpy(part).to(whole.device)])
    return replace(train, **parts)


def load_test(device):
    """The test images. No training script calls this, so that none chooses anything by them."""
    images, labels, classes = _read("test")
    return _image_set(images, labels, classes, np.arange(len(images)), device, None)


def choose(labels, count, purpose):
    """The positions of `count` images, every class in its share to within one; for one purpose always the same ones."""
    order = np.random.default_rng(purpose).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    places = (np.arange(count) + 0.5) * len(labels) / max(count, 1)  # evenly spaced
    return by_class[places.astype(int)]


def dataset_name():
    """What the checkpoints' folder is called: the DATASET's own name, or a folder's with a hash of its whole path."""
    dataset = (os.environ.get("DATASET") or str(DATASET)).rstrip("/")
    if dataset in BUILT_IN:
        return dataset
    path = path_from("DATASET", DATASET).resolve()
    return f"{path.name}-{fingerprint(str(path))[:6]}"


def _read(split):
    """Images, uint8 [N, SIZE, SIZE, 3], labels, int64 [N], and the names of the classes."""
    name = dataset_name()
    if name in BUILT_IN and SIZE != 32:
        raise SystemExit(f"SIZE = {SIZE} in data.py is for folders of images: {name} needs SIZE = 32.")
    if name == "synthetic":
        read = synthetic(split)
    elif name in BUILT_IN:
        read = _cifar(BUILT_IN[name], split)
    else:
        read = _folder(path_from("DATASET", DATASET), split)
    images, labels, classes = read
    return images, np.asarray(labels, dtype=np.int64), tuple(classes)


def _image_set(images, labels, classes, positions, device, content):
    """Those of the images at the positions, moved to the device. The whole set is not copied."""
    if len(positions) < len(images):
        images = images[positions]
    images = torch.from_numpy(images).to(device)
    labels = torch.from_numpy(labels[positions]).to(device)
    index = torch.from_numpy(positions).to(device)
    return ImageSet(dataset_name(), classes, images, labels, index, content)


def _cifar(dataset, split):
    folder = path_from("DATA_DIR", DATA_DIR)
    if RANK > 0:
        torch.distributed.barrier()  # until rank 0 has downloaded what the others then find
    try:
        loaded = dataset(folder, train=split == "train", download=True)
    except Exception as error:  # no network, no disk, a damaged archive: nearly anything
        way_out = f"put an undamaged {dataset.filename} there (from {dataset.url}), or run with DATASET=synthetic"
        raise SystemExit(f"No {dataset.__name__} in {folder} (DATA_DIR), no download ({error}): {way_out}.") from None
    if RANK == 0 and WORLD_SIZE > 1:
        torch.distributed.barrier()
    return loaded.data, loaded.targets, loaded.classes


# ---- Views and batches -----------------------------------------------------------------------------------------------


def batches(split, batch_size, epoch=None, seed=0):
    """Yields (images, labels, positions), each image of the split once.

    images: float32 [B, 3, SIZE, SIZE], 0 to 1, channels-last in memory. labels: int64 [B].
    positions: int64 [B], the images' places in the split.
    With an epoch the images are that epoch's views and shuffled, by (seed, epoch); without one they are as they are and
    in order. The batches hold batch_size images at most and differ by one at most, so that no epoch ends in a tiny one.
    One of several processes gets its share of each batch.
    """
    count = len(split)
    device = split.labels.device
    if epoch is None:
        description = ""
        order = torch.arange(count, device=device)
        rows = columns = torch.arange(SIZE, device=device).expand(count, SIZE)
    else:
        description = f"epoch {epoch + 1}"
        shuffled = np.random.default_rng([ORDER, seed, epoch]).permutation(count)
        order = torch.from_numpy(shuffled).to(device)
        rows, columns = draw_views(seed, epoch, int(split.index.max()) + 1).to(device)[:, split.index]
    parts = order.tensor_split(batch_count(count, batch_size))
    for part in tqdm(parts, description, unit=" batches", **BAR):
        positions = part.tensor_split(WORLD_SIZE)[RANK]
        image = positions[:, None, None]
        row = rows[positions, :, None]
        column = columns[positions, None, :]
        images = split.images[image, row, column]  # each pixel of each view: [B, SIZE, SIZE, 3]
        yield images.permute(0, 3, 1, 2) / 255, split.labels[positions], positions


def batch_count(images, batch_size):
    """How many batches `batches` makes of that many images."""
    return math.ceil(images / batch_size)


def draw_views(seed, epoch, count):
    """Which pixels of images 0 to count - 1 are shown in this epoch: their rows and columns, int64 [2, count, SIZE].

    Each image is shifted by up to SHIFT pixels, its own edge reflected in what that uncovers. With MIRROR every second
    epoch shows it mirrored, so that two show both sides (alternating flip, Jordan 2024, arXiv:2404.00498). The entries
    of image i are the same whatever the count.
    """
    shifts = np.random.default_rng([SHIFTS, seed, epoch]).integers(-SHIFT, SHIFT + 1, (count, 2, 1))
    pixels = np.abs(np.arange(SIZE) + shifts)  # pixel -1 is pixel 1
    pixels = SIZE - 1 - np.abs(SIZE - 1 - pixels)  # pixel SIZE is pixel SIZE - 2
    rows = pixels[:, 0]
    columns = pixels[:, 1]
    if MIRROR:
        first = np.random.default_rng([MIRRORS, seed]).integers(0, 2, (count, 1))
        mirrored = (first + epoch) % 2 == 1
        columns = np.where(mirrored, SIZE - 1 - columns, columns)
    return torch.from_numpy(np.stack([rows, columns]))


# ---- Folders of images -----------------------------------------------------------------------------------------------


def _folder(root, split):
    """root/<split>/<class>/**/*: all files whose ending Pillow can read, resized to SIZE."""
    if not root.exists():
        raise SystemExit(f"DATASET = {str(root)!r} does not exist. It can also be {', '.join(BUILT_IN)}.")
    left_out = []
    train = _files_by_class(root, "train", left_out)
    test = _files_by_class(root, "test", left_out)
    if left_out:
        print(f"Left out because of their endings: {len(left_out)} files in {root}, such as {left_out[0].name}.")
    unpaired = sorted(train.keys() ^ test.keys())
    if unpaired or len(train) < 2:
        wanted = "train/<class>/<images> and test/<class>/<images>, with the same classes, at least two"
        only = f"; only train or only test has images of {unpaired[:5]}" if unpaired else ""
        raise SystemExit(f"DATASET = {str(root)!r} must be a folder with {wanted}{only}.")
    classes = sorted(train)
    paths = []
    labels = []
    for label, name in enumerate(classes):
        files = train[name] if split == "train" else test[name]
        paths += files
        labels += [label] * len(files)
    return read_images(paths, f"reading {root / split}"), labels, classes


def _files_by_class(root, split, left_out):
    """The images of each class that has some. What has other endings is added to left_out."""
    by_class = {}
    for path in _files_below(root / split, "*/**/*"):
        if path.suffix.lower() in ENDINGS:
            name = path.relative_to(root / split).parts[0]
            by_class.setdefault(name, []).append(path)
        else:
            left_out.append(path)
    return by_class


def _files_below(folder, pattern):
    """All that match, sorted. Hidden ones do not count, nor do those that a NAS adds (@eaDir, #recycle). A link to a
    folder counts as a file: it is not followed where the pattern has `**`, so that no image comes twice.
    """
    found = []
    for path in sorted(folder.glob(pattern)):
        parts = path.relative_to(folder).parts
        shown = not any(part.startswith((".", "@", "#")) for part in parts)
        if shown and (path.is_symlink() or not path.is_dir()):
            found.append(path)
    return found


def read_images(paths, description):
    """uint8 [N, SIZE, SIZE, 3], read by as many threads as torch uses; ends the script as `read_image` does."""
    images = np.empty((len(paths), SIZE, SIZE, 3), np.uint8)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        read = pool.map(read_image, paths)  # where one fails, those that have not begun are left out
        for place, image in enumerate(tqdm(read, description, len(paths), unit=" images", **BAR)):
            images[place] = image
    return images


def read_image(path):
    """uint8 [SIZE, SIZE, 3] from a file of any size and colour mode; ends the script with one sentence where it cannot.

    A photograph is turned as its camera was held; transparent parts become white.
    """
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # some hold a megabyte of text and more
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):  # Pillow would cut the values off at 255
                raise ValueError("it has more than 8 bits per channel")
            picture.draft("RGB", (4 * SIZE, 4 * SIZE))  # a large JPEG is decoded at a fraction of its size
            picture = ImageOps.exif_transpose(picture).convert("RGBA").resize((SIZE, SIZE))
            white = Image.new("RGBA", picture.size, "white")
            return np.array(Image.alpha_composite(white, picture).convert("RGB"))
    except Exception as error:  # the decoders of so many formats raise nearly anything
        raise SystemExit(f"The image {path} cannot be read: {error}. Convert, shrink or remove it.") from None


# ---- Synthetic images ------------------------------------------------------------------------------------------------


def synthetic(split):
    """Ten classes of drawn flowers, always the same ones: uint8 [N, 32, 32, 3], int64 [N], the classes' names.

    A class is a number of petals, 3 to 7, filled or as an outline. The label is truly uncertain: a flower stands
    anywhere between two numbers, and is labelled by chance, see `synthetic_chance`. All else varies from image to
    image. Drawn in float64: in float32 a few pixels would differ between processors.
    """
    count = SYNTHETIC_IMAGES[split]
    rng = np.random.default_rng([DRAWING, split == "test"])
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(count, np.int64)
    for i in range(count):
        outlined = i % 2
        images[i], petals = _flower(rng, outlined)
        labels[i] = 2 * (petals - 3) + outlined
    classes = [f"{number} {form}" for number in range(3, 8) for form in ("filled", "outlined")]
    return images, labels, classes


def _flower(rng, outlined):
    """One picture, uint8 [SIZE, SIZE, 3], and the number of petals that it is said to show."""
    petals = np.clip(rng.uniform(2.5, 7.5), 3, 7)
    fewer = min(int(petals), 6)
    share = petals - fewer  # of the way from that number to the next
    number = fewer + (rng.random() < synthetic_chance(share))

    column = np.arange(SIZE) - (SIZE - 1) / 2
    row = column[:, None]
    x = column - rng.uniform(-5, 5)
    y = row - rng.uniform(-5, 5)
    turn = rng.uniform(0, 2 * np.pi)
    squeeze = rng.uniform(0.83, 1.2)
    across = squeeze * (x * np.cos(turn) - y * np.sin(turn))
    along = (x * np.sin(turn) + y * np.cos(turn)) / squeeze
    angle = np.arctan2(along, across)
    edge = (1 - share) * np.cos(fewer * angle) + share * np.cos((fewer + 1) * angle)
    size = rng.uniform(7, 12) * (1 + rng.uniform(0.2, 0.35) * edge)
    inside = size - np.hypot(across, along)  # pixels from the edge, positive within
    if outlined:
        inside = 1.5 - np.abs(inside - 1.5)
    cover = np.clip(inside + 0.5, 0, 1)[..., None]

    def wave():
        """A part of a texture, with a direction and length, a colour and a phase of its own."""
        to_right, down = rng.uniform(-0.6, 0.6, 2)
        height = np.sin(to_right * column + down * row + rng.uniform(0, 6.3))
        return rng.uniform(-0.2, 0.2, 3) * height[..., None]

    ground = rng.uniform(0.2, 0.8, 3)
    contrast = rng.uniform(0.1, 0.4, 3)
    flower = np.where(ground < 0.5, ground + contrast, ground - contrast)  # lighter or darker, in each channel
    picture = (1 - cover) * (ground + wave() + wave())
    picture += cover * (flower + wave() + wave())
    picture += rng.normal(0, 0.06, picture.shape)
    return (picture.clip(0, 1) * 255).round(), number


def synthetic_chance(share):
    """With which chance a flower that stands at `share` between two numbers of petals gets the higher one."""
    return 1 / (1 + np.exp(-10 * (share - 0.5)))  # half at the middle, nearly sure at a whole number


# ---- Fingerprints ----------------------------------------------------------------------------------------------------


def image_hashes(images):
    """int64 [N]: the same number for the same pixels, uint8 [N, H, W, 3], whatever the dataset."""
    return torch.tensor([int(fingerprint(image), 16) - 2**63 for image in images.cpu()])


def fingerprint(*parts):
    """16 hexadecimal digits that follow from the content of arrays and tensors, and from the `repr` of plain values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.cpu().flatten().view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:16]
