"""The images: which ones, held whole on the device as one uint8 tensor, and batches of random views of them.

A *view* of an image is one shifted and perhaps mirrored copy of it. Which view of image i is shown in epoch e follows
from (VIEW_SEED, e, i) alone: not from the batch, the device or the seed of a network. So a student that learns alone
and one that learns from a teacher see the same views, and with one SEED in the same order.
"""

import hashlib
import math
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import Image  # Pillow's, which torchvision brings along
from tqdm import tqdm

DATASET = "cifar10"  # "cifar10", "synthetic", or a folder with train/<class>/* and test/<class>/*; environment: DATASET
DATA_DIR = "data"  # downloads; beside this file unless absolute; or DATA_DIR in the environment
HOLD_OUT = 0  # training images set aside to tune on, reported after each epoch; 0 trains on all of them
VIEW_SEED = 0  # seeds shifts and mirrorings; another number shows other views of the same images
SHIFT = 2  # pixels by which a view may be moved up, down, left and right

SIZE = 32  # height and width of every image, pixels; the networks in models.py are built for it
SYNTHETIC_IMAGES = {"train": 3000, "test": 10000}  # few to learn from, where a good teacher helps most; many to measure
DOWNLOAD_TIMEOUT = 30  # seconds without an answer after which a download is given up

# First word of each random seed, so that no two uses draw the same numbers.
ORDER, SHIFTS, MIRRORS, SETTING_ASIDE, DRAWING = range(1, 6)


@dataclass
class ImageSet:
    """One split of a dataset, whole, on one device.

    images: uint8 [N, H, W, 3]; those of a training set carry SHIFT pixels of mirrored border on each side.
    labels: int64 [N]. index: int64 [N], each image's number in the whole split, which its views follow from.
    mean, std: three numbers each, of the training images' channels on the scale 0 to 1; None for test images.
    fingerprint: of the training images, their labels and statistics; "" for test images.
    """

    dataset: str
    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    index: Tensor
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def normalised_as_in(self, checkpoint: dict) -> "ImageSet":
        """The same images for the network of a checkpoint: with the mean and std that it was trained with."""
        return replace(self, mean=tuple(checkpoint["mean"]), std=tuple(checkpoint["std"]))


def load_train(device: torch.device | str) -> tuple[ImageSet, ImageSet | None]:
    """The training images without the hold-out, and the hold-out (None where HOLD_OUT is 0)."""
    images, labels, classes = _read("train")
    most = max(len(images) - len(classes), 0)
    if HOLD_OUT > most:
        raise SystemExit(
            f"HOLD_OUT = {HOLD_OUT} in data.py must be at most {most}: "
            f"{dataset_name()} has {len(images)} training images in {len(classes)} classes."
        )
    held_out = hold_out_positions(labels, HOLD_OUT)
    rest = np.setdiff1d(np.arange(len(images)), held_out)
    kept, kept_labels = images[rest], labels[rest]
    mean, std = channel_statistics(kept)
    own = mean, std, fingerprint(kept, kept_labels, classes, mean, std)
    bordered = np.pad(kept, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="reflect")
    train = _image_set(bordered, kept_labels, classes, rest, device, *own)
    hold_out = _image_set(images[held_out], labels[held_out], classes, held_out, device, *own)
    return train, hold_out if HOLD_OUT else None


def load_test(device: torch.device | str) -> ImageSet:
    """The test images. No training script calls this: nothing is chosen by looking at them.

    How to normalise them is each network's own: see `ImageSet.normalised_as_in`.
    """
    images, labels, classes = _read("test")
    return _image_set(images, labels, classes, np.arange(len(images)), device)


def batches(
    split: ImageSet, batch_size: int, epoch: int | None = None, seed: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (images, labels, positions), each image of the split once.

    images: float32 [B, 3, 32, 32], normalised, channels-last in memory. labels: int64 [B].
    positions: int64 [B], the images' places in the split.
    With an epoch the images are that epoch's views, without one they are shown as they are. With a seed the order is
    shuffled by (seed, epoch), without one it is the split's own. The batches hold batch_size images at most and
    differ by one at most, so that no epoch ends in a tiny one. One of several processes gets its share of each batch.
    """
    count, device = len(split), split.labels.device
    border = (split.images.shape[1] - SIZE) // 2
    # Every crop of every image, without a copy: [N, shifts down, shifts right, 32, 32, 3].
    crops = split.images.unfold(1, SIZE, 1).unfold(2, SIZE, 1).permute(0, 1, 2, 4, 5, 3)
    down = right = torch.full((count,), border, device=device)
    if epoch is not None:
        drawn = draw_views(epoch, int(split.index.max()) + 1)
        down, right, mirrored = (part.to(device)[split.index] for part in drawn)
    mean, std = torch.tensor([split.mean, split.std]).to(device).repeat(1, SIZE)  # of each value in a row of pixels
    scale, offset = 1 / (255 * std), -mean / std
    order = torch.arange(count, device=device)
    if seed is not None:
        order = torch.from_numpy(np.random.default_rng([ORDER, seed, epoch or 0]).permutation(count)).to(device)

    rank, world_size = processes()
    for batch in order.tensor_split(batch_count(count, batch_size)):
        positions = batch.tensor_split(world_size)[rank]
        images = crops[positions, down[positions], right[positions]]
        if epoch is not None:
            images = torch.where(mirrored[positions, None, None, None], images.flip(2), images)
        rows = images.flatten(2).float()  # a row at a time is ten times as fast as a pixel at a time
        images = rows.mul_(scale).add_(offset).view(images.shape).permute(0, 3, 1, 2)
        yield images, split.labels[positions], positions


def batch_count(images: int, batch_size: int) -> int:
    """How many batches `batches` makes of that many images."""
    return math.ceil(images / batch_size)


def draw_views(epoch: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """How images 0 to count - 1 are shown in this epoch: (down, right, mirrored), each [count], on the CPU.

    down, right: int64, 0 to 2 * SHIFT, where the crop begins in the image with its border. mirrored: bool; each image
    is mirrored in every second epoch, so that two epochs show both sides (alternating flip, Jordan 2024,
    arXiv:2404.00498). The entries of image i are the same whatever the count.
    """
    down, right = np.random.default_rng([SHIFTS, VIEW_SEED, epoch]).integers(0, 2 * SHIFT + 1, (count, 2)).T
    first = np.random.default_rng([MIRRORS, VIEW_SEED]).integers(0, 2, count)
    return torch.tensor(down), torch.tensor(right), torch.tensor((first + epoch) % 2 == 1)


def hold_out_positions(labels: np.ndarray, count: int) -> np.ndarray:
    """Which `count` images to set aside: every class in its share to within one, the same ones on every run."""
    order = np.random.default_rng(SETTING_ASIDE).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    return by_class[((np.arange(count) + 0.5) * len(labels) / max(count, 1)).astype(int)]


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 [N, H, W, 3], on the scale 0 to 1."""
    rows, count = (-1, images.shape[2] * 3), images.size / 3  # whole rows are summed at once: it is much faster
    total = images.reshape(rows).sum(0, dtype=np.int64).reshape(-1, 3).sum(0)
    squares = np.square(images, dtype=np.uint16).reshape(rows).sum(0, dtype=np.int64).reshape(-1, 3).sum(0)
    mean = total / count / 255
    variance = squares / count / 255**2 - mean**2
    std = np.sqrt(np.maximum(variance, 1 / 255**2))  # a channel of one value must not divide by 0
    return tuple(mean.tolist()), tuple(std.tolist())


# Where the images come from -------------------------------------------------------------------------------------------


def dataset_name() -> str:
    """What the checkpoints' folder is called: the DATASET's own name, or a folder's with a hash of its whole path."""
    dataset = os.environ.get("DATASET") or DATASET
    if dataset in ("cifar10", "synthetic"):
        return dataset
    path = Path(dataset).resolve()
    return f"{path.name}-{fingerprint(str(path))[:6]}"


def _read(split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images, uint8 [N, 32, 32, 3], labels, int64 [N], and the names of the classes."""
    check_constants(__file__, globals())
    dataset = os.environ.get("DATASET") or DATASET
    if dataset == "cifar10":
        images, labels, classes = _cifar10(split)
    elif dataset == "synthetic":
        images, labels, classes = synthetic(split)
    else:
        images, labels, classes = _folder(Path(dataset), split)
    return images, np.asarray(labels, dtype=np.int64), tuple(classes)


def _image_set(images, labels, classes, index, device, *statistics) -> ImageSet:
    images, labels, index = (torch.from_numpy(array).to(device) for array in (images, labels, index))
    return ImageSet(dataset_name(), classes, images, labels, index, *statistics)


def _cifar10(split: str) -> tuple[np.ndarray, list[int], list[str]]:
    folder = Path(os.environ.get("DATA_DIR") or Path(__file__).parent / DATA_DIR)
    rank, world_size = processes()
    if rank > 0:
        torch.distributed.barrier()  # until rank 0 has downloaded what the others then find
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        loaded = CIFAR10(folder, train=split == "train", download=True)
    except Exception as error:  # no network, no disk, a damaged archive: nearly anything
        raise SystemExit(
            f"CIFAR-10 is not in {folder} (DATA_DIR) and could not be downloaded ({error}): put a sound "
            f"{CIFAR10.filename} there (from {CIFAR10.url}), or run with DATASET=synthetic, which needs no download."
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    if rank == 0 and world_size > 1:
        torch.distributed.barrier()
    return loaded.data, loaded.targets, loaded.classes


def _folder(root: Path, split: str) -> tuple[np.ndarray, list[int], list[str]]:
    """root/<split>/<class>/*, all the files that Pillow knows by their endings, resized to 32x32."""
    train, test = ({entry.name for entry in (root / part).glob("*") if entry.is_dir()} for part in ("train", "test"))
    if train != test or len(train) < 2:
        only = f"; only one has {sorted(train ^ test)[:5]}" if train != test else ""
        raise SystemExit(
            f"DATASET = {str(root)!r} (data.py) must be cifar10, synthetic or a folder with train/<class>/<images> and "
            f"test/<class>/<images>, the same classes in both, two at least{only}."
        )
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    try:
        folder = ImageFolder(root / split, is_valid_file=lambda path: Path(path).suffix.lower() in endings)
    except FileNotFoundError as error:
        raise SystemExit(f"{root / split} (DATASET) must hold one folder of images per class: {error}.") from None
    bar = tqdm(folder.samples, f"reading {root / split}", unit=" images", disable=bar_disabled(), leave=False)
    return np.stack([read_image(path) for path, _ in bar]), folder.targets, folder.classes


def read_image(path: str) -> np.ndarray:
    """uint8 [32, 32, 3] from a file of any size and colour mode; ends the script with one sentence where it cannot."""
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):  # Pillow would cut the values off at 255
                raise ValueError("it has more than 8 bits per channel, convert it first")
            return np.array(picture.convert("RGB").resize((SIZE, SIZE)))
    except Exception as error:  # the decoders of so many formats raise nearly anything
        raise SystemExit(f"The image {path} cannot be read: {error}.") from None


def synthetic(split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Ten classes of drawn flowers, always the same ones: uint8 [N, 32, 32, 3], int64 [N], the classes' names.

    A class is a number of petals, 3 to 7, filled or as an outline. The label is truly uncertain: a flower stands
    anywhere between two numbers, and is labelled by chance, see `synthetic_chances`. Place, size, turn, squeeze, depth
    of the petals, colours and background vary from image to image.
    """
    count = SYNTHETIC_IMAGES[split]
    rng = np.random.default_rng([DRAWING, split == "test"])

    def draw(low, high, *shape):
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    petals, outlined = draw(2.5, 7.5).clip(3, 7), np.arange(count) % 2
    fewer = np.floor(petals).clip(3, 6)
    share = petals - fewer
    labels = 2 * (fewer.astype(np.int64) - 3 + (draw(0, 1) >= 1 - synthetic_chances(share))) + outlined
    fewer, share = fewer[:, None, None], share[:, None, None]
    grid = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
    x = grid[None, None, :] - draw(-5, 5, 1, 1)
    y = grid[None, :, None] - draw(-5, 5, 1, 1)
    turn, squeeze = draw(0, 2 * np.pi, 1, 1), draw(0.83, 1.2, 1, 1)
    x, y = (x * np.cos(turn) - y * np.sin(turn)) * squeeze, (x * np.sin(turn) + y * np.cos(turn)) / squeeze
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    waves = (1 - share) * np.cos(fewer * angle) + share * np.cos((fewer + 1) * angle)
    inside = draw(7, 12, 1, 1) * (1 + draw(0.2, 0.35, 1, 1) * waves) - radius  # pixels from the edge, positive within
    shape = np.where(outlined[:, None, None] == 1, 1.5 - np.abs(inside - 1.5), inside)
    cover = np.clip(shape + 0.5, 0, 1)[..., None]

    def texture():
        """Two waves of random direction, length and colour: [N, 32, 32, 3]."""
        waves = np.zeros((count, SIZE, SIZE, 3), np.float32)
        for _ in range(2):
            across = draw(-0.6, 0.6, 1, 1) * grid[None, None, :] + draw(-0.6, 0.6, 1, 1) * grid[None, :, None]
            waves += draw(-0.2, 0.2, 1, 1, 3) * np.sin(across + draw(0, 6.3, 1, 1))[..., None]
        return waves

    ground = draw(0.2, 0.8, 1, 1, 3)
    flower = ground + np.where(ground < 0.5, 1, -1) * draw(0.1, 0.4, 1, 1, 3)  # lighter or darker, in each channel
    images = (1 - cover) * (ground + texture()) + cover * (flower + texture())
    images += rng.normal(0, 0.06, images.shape).astype(np.float32)
    names = [f"{number} {form}" for number in range(3, 8) for form in ("filled", "outlined")]
    return (images.clip(0, 1) * 255).round().astype(np.uint8), labels, names


def synthetic_chances(share: np.ndarray) -> np.ndarray:
    """With which chance [N] flowers that stand at `share` [N] between two numbers of petals get the higher one."""
    return 1 / (1 + np.exp(-10 * (share - 0.5)))  # half at the middle, nearly sure at a whole number


# What all scripts share -----------------------------------------------------------------------------------------------

LIMITS = {  # constant: type, least, most; of texts and tuples these limit the length
    "DATASET": (str, 1, math.inf),
    "DATA_DIR": (str, 1, math.inf),
    "CHECKPOINT_DIR": (str, 1, math.inf),
    "TEACHER_WIDTHS": (tuple, 2, 4),
    "STUDENT_WIDTHS": (tuple, 2, 4),
    "BFLOAT16": (bool, 0, 1),
    "HOLD_OUT": (int, 0, math.inf),
    "VIEW_SEED": (int, 0, math.inf),
    "SHIFT": (int, 0, SIZE - 1),
    "SEED": (int, 0, 2**63 - 1),
    "EPOCHS": (int, 1, math.inf),
    "BATCH_SIZE": (int, 1, math.inf),
    "LEARNING_RATE": (float, 1e-12, 1e38),
    "WEIGHT_DECAY": (float, 0, 1e38),
    "LABEL_SMOOTHING": (float, 0, 1),
    "TEMPERATURE": (float, 0.1, 100),  # beyond, float32 keeps too few digits of the loss
    "KD_WEIGHT": (float, 0, 1),
    "MOMENTUM": (float, 1e-12, 1),
    "MUON_MOMENTUM": (float, 0, 1),
    "MUON_SCALE": (float, 1e-12, 1e38),
    "WARM_UP": (float, 0, 1),
}
WANTED = {
    str: "a text that is not empty",
    tuple: "a tuple of {} to {} whole numbers of at least 1",
    bool: "True or False",
    int: "a whole number from {} to {}",
    float: "a number from {} to {}",
}


def check_constants(file: str, constants: dict) -> dict:
    """Ends the script with one sentence unless those of a file's global names that have limits are within them.

    Returns the numbers among them, which decide what a training does.
    """
    limited = {name: constants[name] for name in LIMITS if name in constants}
    for name, value in limited.items():
        kind, low, high = LIMITS[name]
        valid = type(value) is kind or (kind is float and type(value) is int)
        valid = valid and low <= (len(value) if kind in (str, tuple) else value) <= high
        if not valid or (kind is tuple and not all(type(part) is int and part >= 1 for part in value)):
            raise SystemExit(f"{name} = {value!r} in {Path(file).name} must be {WANTED[kind].format(low, high)}.")
    return {name: value for name, value in limited.items() if LIMITS[name][0] in (int, float)}


def fingerprint(*parts) -> str:
    """16 hexadecimal digits that follow from the content of arrays and tensors, and from the `repr` of plain values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.cpu().flatten().view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:16]


def bar_disabled() -> bool | None:
    """tqdm's `disable`: False in a notebook, True in all processes but rank 0, else None: draw on terminals only."""
    if processes()[0] > 0:
        return True
    return False if "ipykernel" in sys.modules else None


def processes() -> tuple[int, int]:
    """This process's rank and the world size: (0, 1) unless torchrun started several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
