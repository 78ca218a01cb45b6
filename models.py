"""The networks, and what every script does with one, in sections: networks; optimizer and schedule; device, precision,
processes; making, trying and asking a network; a training's progress; files; what a training was.

Anything that maps images [B, 3, SIZE, SIZE], 0 to 1, to logits [B, classes] can be returned by teacher() or student().
"""

import contextlib
import itertools
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

import data
from data import RANK, WORLD_SIZE, ImageSet

TEACHER_WIDTHS = (24, 64, 256, 256)  # channels: of the stem, then of each stage, which halves the resolution
STUDENT_WIDTHS = (24, 16, 64, 96)  # 14 % of the teacher's parameters, 10 % of its multiply-accumulates
MOMENTUM = 0.9  # of SGD, Nesterov's
MUON_MOMENTUM = 0.6  # of Muon, Nesterov's too
MUON_SCALE = 175.0  # Muon turns a kernel by LEARNING_RATE * MUON_SCALE / steps**MUON_POWER radians at its peak
MUON_POWER = 0.75  # so the angle depends on how many steps the training has, by EPOCHS and BATCH_SIZE
MUON_STEPS = (288, 4800)  # fewer or more steps count as these, between which it was measured: tests/experiments.md
WARM_UP = 0.2  # share of the steps over which the learning rate rises to its peak, before it falls to 0
BFLOAT16 = True  # bfloat16 products where the processor has them, up to twice as fast; False: float32, and no TF32
CHECKPOINT_DIR = "checkpoints"  # beside this file unless absolute; or CHECKPOINT_DIR in the environment

ROOT = Path(__file__).resolve().parent
PREDICTION_BATCH = {"cuda": 2000, "cpu": 125}  # images: what fills a GPU, what fits a CPU's cache
SCRIPTS = {"teacher": "train_teacher.py", "student": "train_student.py", "distilled": "distill.py"}
OUR_FILES = {*SCRIPTS.values(), "evaluate.py", "data.py", "models.py"}
FORMAT = 4  # of checkpoints, which hold tensors and plain values only
TOLERANCE = 1e-4  # of a saved network's answers, a share of the largest; rounding moved them by 5e-6, edits by 7e-4
LIMITS = {  # constant: least, most; where the least is an int, it must be a whole number
    "HOLD_OUT": (0, math.inf),
    "TRAIN_IMAGES": (0, math.inf),
    "SIZE": (16, 256),
    "SHIFT": (0, data.SIZE - 1),
    "WARM_UP": (0.0, 1),
    "SEED": (0, 2**32 - 1),  # numpy's generators take seeds in words of 32 bits
    "EPOCHS": (1, math.inf),
    "BATCH_SIZE": (2 * WORLD_SIZE - 1, math.inf),  # then every process has an image of every batch
    "LEARNING_RATE": (1e-12, 1e35),
    "WEIGHT_DECAY": (0.0, 1e38),
    "LABEL_SMOOTHING": (0.0, 1),
    "TEMPERATURE": (0.1, 100),  # beyond, float32 keeps too few digits of the loss
    "KD_WEIGHT": (0.0, 1),
}
NOT_IN_RECIPE = {  # constants that change no training, or that the fingerprint of the images stands for
    "DATASET",
    "SYNTHETIC_IMAGES",
    "DATA_DIR",
    "CHECKPOINT_DIR",
    "PREDICTION_BATCH",
    "SCRIPTS",
    "LIMITS",
    "LAUNCHED",
    "RANK",
    "BAR",
}


# ---- Networks --------------------------------------------------------------------------------------------------------


def teacher(classes: int) -> nn.Module:
    """The high-capacity network."""
    return ConvNet(classes, TEACHER_WIDTHS)


def student(classes: int) -> nn.Module:
    """The lightweight network, the same whether it learns alone or from a teacher."""
    network = ConvNet(classes, STUDENT_WIDTHS)
    network.stages[-1] = LastStage(*STUDENT_WIDTHS[-2:])
    return network


class ConvNet(nn.Module):
    """Maps images [B, 3, SIZE, SIZE], 0 to 1, to logits [B, classes], in the shape of airbench94 (Jordan 2024,
    arXiv:2404.00498): a 2x2 convolution, stages of two 3x3 convolutions, global max pooling, a linear layer.
    widths: channels of the first convolution, then of each stage.
    """

    def __init__(self, classes, widths):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], kernel_size=2)
        self.stages = nn.Sequential(*(Stage(inputs, outputs) for inputs, outputs in zip(widths, widths[1:])))
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images):
        normalised = (images - 0.5) * 4  # mean 0 and standard deviation 1, nearly, of most photographs
        features = self.stages(F.relu_(self.stem(normalised)))  # in place: less memory to pass over
        return self.head(F.adaptive_max_pool2d(features, 1).flatten(1)) / 9  # small logits: gentle first steps


class Stage(nn.Module):
    """[B, inputs, H, W] to [B, outputs, H // 2, W // 2]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, features):
        features = F.relu_(self.norm1(F.max_pool2d(self.conv1(features), 2)))  # pooled first: a quarter to normalise
        return self.refine(features)

    def refine(self, features):
        return F.relu_(self.norm2(self.conv2(features)))


class LastStage(Stage):
    """A Stage with a third convolution, and a skip around the second and the third. Where there are few pixels left it
    costs little.
    """

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.conv3 = conv3x3(outputs, outputs)
        self.norm3 = nn.BatchNorm2d(outputs)

    def refine(self, features):
        refined = super().refine(features)
        return features + F.relu_(self.norm3(self.conv3(refined)))


def conv3x3(inputs, outputs):
    """A convolution that starts by passing on what comes in; outputs beyond that are random."""
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:inputs])
    return convolution


# ---- Optimizer and schedule ------------------------------------------------------------------------------------------


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum; for most convolutions Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Muon replaces a kernel's step, as a matrix [outputs, inputs * H * W], by the nearest one whose singular values are
    all the same, so that few large directions do not drown the others. It takes every `nn.Conv2d` without a bias, which
    a normalisation is expected to follow, but the first and those in groups. A kernel keeps the norm with which it
    starts, so the learning rate is an angle: with LEARNING_RATE = 0.1 it is 0.25 radians at the peak of 288 steps or
    fewer and 0.03 at that of 4,800 or more. Weight decay is for the other weights only, not for biases and norms.
    torch.optim.Muon takes matrices only.
    """

    def __init__(self, network, learning_rate, weight_decay, steps):
        fewest, most = MUON_STEPS
        self.turn = MUON_SCALE / max(fewest, min(steps, most)) ** MUON_POWER  # radians at a learning rate of 1
        self.norms = {}  # kernel: its norm
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        for convolution in convolutions[1:]:
            kernel = convolution.weight
            bare = convolution.bias is None and convolution.groups == 1
            if bare and kernel.is_leaf and kernel.any():  # one of zeros could not turn
                self.norms[kernel] = kernel.detach().norm()
        others = [parameter for parameter in network.parameters() if parameter not in self.norms]
        groups = [
            {"params": list(self.norms), "momentum": MUON_MOMENTUM},
            {"params": [parameter for parameter in others if parameter.ndim > 1], "weight_decay": weight_decay},
            {"params": [parameter for parameter in others if parameter.ndim <= 1]},
        ]
        super().__init__(groups, learning_rate, momentum=MOMENTUM, nesterov=True)
        for kernel in self.norms:
            self.state[kernel]["momentum_buffer"] = torch.zeros_like(kernel)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for kernel, norm in self.norms.items():
            if kernel.grad is None:
                continue
            momentum = self.state[kernel]["momentum_buffer"]
            momentum.mul_(group["momentum"]).add_(kernel.grad)
            update = kernel.grad.add(momentum, alpha=group["momentum"]).flatten(1)
            direction = orthogonalise(update).reshape(kernel.shape) * (norm / min(update.shape) ** 0.5)
            kernel.mul_(norm / kernel.norm().clamp(min=1e-7))
            kernel.sub_(direction, alpha=group["lr"] * self.turn)
            kernel.grad = None  # done: what is left is for SGD
        super().step()


def orthogonalise(matrix):
    """The matrix [M, N] with the singular vectors of `matrix`, and with singular values that are nearly the same.

    Where those of `matrix` are within a factor of ten they become 0.25 to 1.2 for a rank of 256, and 0.18 to 1.2 for
    one of 512; smaller ones stay smaller. By three Newton-Schulz steps (Jordan et al. 2024).
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.mT).mT  # the product below is the smaller one
    nearer = (matrix / (matrix.norm() + 1e-7)).to(precision(matrix.device))  # singular values of 1 at most
    for _ in range(3):
        gram = nearer @ nearer.mT
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        nearer = torch.addmm(nearer, polynomial, nearer, beta=3.4445)
    return nearer.to(matrix.dtype)


def make_schedule(optimizer, steps):
    """Scales the optimizer's learning rates, whatever they are: linear warm-up to them, linear decay to 0."""
    warmup_steps = max(1, round(WARM_UP * steps))
    decay_steps = max(1, steps - warmup_steps)
    return LambdaLR(optimizer, lambda step: min((step + 1) / (warmup_steps + 1), (steps - step) / decay_steps))


# ---- Device, precision, processes ------------------------------------------------------------------------------------


def setup():
    """What every script calls first: its device, CUDA if available. Processes of torchrun meet here; rank 0 prints."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = BFLOAT16
        torch.backends.cuda.matmul.allow_tf32 = BFLOAT16
    if data.LAUNCHED and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may have letters that a console has not
    return device


def run_script(main):
    """Runs a script's `main`; Ctrl-C ends it with one sentence, and so do arguments, which no script has."""
    if len(sys.argv) > 1:
        script = Path(sys.argv[0]).name
        raise SystemExit(f"{script} takes no arguments ({sys.argv[1]}): edit the constants at the top of the file.")
    try:
        main()
    except KeyboardInterrupt:
        if RANK == 0:
            print("\nInterrupted. To go on, run the same command again.", file=sys.stderr)
        sys.exit(130)
    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()  # not after a failure: it could wait for the other ranks forever


def average_over_processes(*tensors):
    """Replaces each tensor by its mean over all processes, if there are several."""
    if WORLD_SIZE > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= WORLD_SIZE


def autocast(device):
    """Inside it a network computes with the device's `precision`; its weights and its loss are float32 all the same."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


def precision(device):
    """Of convolutions and matrix products: bfloat16 if the device itself has it; emulated, it would be slow."""
    has_bfloat16 = False
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif hasattr(torch.cpu, "get_capabilities"):  # torch 2.11 or newer
        has_bfloat16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if BFLOAT16 and has_bfloat16 else torch.float32


def seed_random_numbers(seed):
    """Seeds the generators of torch, on all devices, of Python and of numpy (whose seeds have 32 bits)."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


# ---- Making, trying and asking a network -----------------------------------------------------------------------------


def new_network(make, train, seed):
    """What `teacher` or `student` makes, on the images' device, with fresh weights that follow from the seed alone.

    It is asked once before it is trained: see `check_logits`. Under torchrun each gradient is averaged over all
    processes by hooks, which unlike DistributedDataParallel leave no wrapper that a script could forget to call.
    """
    seed_random_numbers(seed)
    classes = len(train.classes)
    network = make(classes)
    check_logits(network, classes, f"{make.__name__}() in models.py")  # gives lazy layers their shapes, too
    network.to(train.labels.device, memory_format=torch.channels_last)
    if WORLD_SIZE > 1:
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda parameter: average_over_processes(parameter.grad))
    return network


@torch.no_grad()
def check_logits(network, classes, source):
    """The logits [2, classes] of a network on the CPU for two fixed pictures, of pixels of random colours.

    Ends the script with one sentence about `source` if these are no finite logits. Leaves the network in eval mode.
    """
    colours = np.random.default_rng(0).random((2, 3, data.SIZE, data.SIZE), np.float32)
    logits = None
    if isinstance(network, nn.Module):
        torch.manual_seed(9_999_999_999)  # none that SEED can be; for layers that are random in eval mode too
        logits = network.eval()(torch.from_numpy(colours))
    shape = list(getattr(logits, "shape", ()))
    if shape != [2, classes]:
        wanted = f"must map images {list(colours.shape)} to logits [2, {classes}]"
        raise SystemExit(f"{source} {wanted}, not to {shape or type(logits).__name__}.")
    if not logits.isfinite().all():
        raise SystemExit(f"{source} gives logits that are not finite: a lower LEARNING_RATE may help.")
    return logits


@torch.no_grad()
def predict(network, split, mirror=False):
    """The network's logits for the images as they are, float32 [N, classes]; leaves it in eval mode.

    With mirror, the mean of those for each image and for its mirror image.
    """
    device = split.labels.device
    whole = torch.zeros(len(split), len(split.classes), device=device)
    network.eval()
    with autocast(device):
        for images, _, positions in data.batches(split, PREDICTION_BATCH[device.type]):
            logits = network(images).float()
            if mirror:
                logits = (logits + network(images.flip(3)).float()) / 2
            whole[positions] = logits
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(whole)  # each row is 0 in all processes but one
    return whole


def renew_statistics(network, batches):
    """Batch normalisation's statistics anew, over the views of `data.batches`: after few steps the running ones still
    hold a part of their first values. Where some layers are frozen in eval mode, all is left as it is.
    """
    if all(module.training for module in network.modules()):
        with autocast(next(network.parameters()).device):
            update_bn(itertools.islice(batches, 100), network)  # 100 batches tell as much as all


def parameter_count(network):
    """How many numbers the network learns."""
    return sum(parameter.numel() for parameter in network.parameters())


def accuracy(logits, labels):
    """The share of rows of logits [N, classes] whose largest entry is at the label [N], of those that have one."""
    correct = (logits.argmax(1) == labels).sum().item()
    return correct / (labels >= 0).sum().item()


# ---- A training's progress -------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One network's training: its epochs, its progress on the screen and on the disk, its checkpoint at the end.

    The progress is saved after every epoch but the last. A killed run continues from there; on the CPU it ends in the
    same weights, since all random numbers of an epoch follow from the seed, the epoch and the process alone.
    constants: globals() of its script; a run continues only with the same ones. teacher: who taught it, if anybody did.
    curve: for each epoch the means over the training views of the loss that is trained on, and, of those with a label,
    of the cross-entropy and the accuracy; with a hold-out the accuracy on that; the seconds of training so far.
    """

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    train: ImageSet
    hold_out: ImageSet | None
    constants: dict
    teacher: nn.Module | None = None
    curve: list[dict] = field(default_factory=list)

    def __post_init__(self):
        name = self.name
        train = self.train
        device = train.labels.device
        self.script = SCRIPTS[name]
        self.seed = self.constants["SEED"]
        self.epoch_count = self.constants["EPOCHS"]
        self.batch_size = self.constants["BATCH_SIZE"]
        self.steps = self.epoch_count * data.batch_count(len(train), self.batch_size)
        self.recipe = make_recipe(self.constants, train, self.optimizer, self.schedule)
        self.recipe["steps"] = self.steps
        if self.teacher is not None:
            self.recipe["teacher"] = data.fingerprint(*self.teacher.state_dict().values())
        self.parts = {"network": self.network, "optimizer": self.optimizer, "schedule": self.schedule}
        self.totals = torch.zeros(5, dtype=torch.float64, device=device)  # of the epoch, see `update`
        folder = checkpoint_dir(train.dataset)
        self.checkpoint_path = folder / f"{name}.pt"
        self.progress_path = folder / f"{name}.progress.pt"
        if self.progress_path.exists():
            self._continue()
        unlabelled = (train.labels < 0).sum().item()
        images = f"{len(train) - unlabelled:,} images of {train.dataset}"
        if unlabelled:
            images += f" and {unlabelled:,} without a label"
        print(f"{name}: {parameter_count(self.network):,} parameters, {images}, {self.steps:,} steps, on {device.type}")
        enough = 4000 if name == "distilled" else 500  # labels alone are soon known by heart
        if self.steps < enough / 2 and train.dataset != "synthetic":  # where a first run is to be short
            epochs = math.ceil(enough * self.epoch_count / self.steps)
            print(f"{name}: few steps; with EPOCHS = {epochs} in {self.script} there would be {enough:,}.")
        sys.stdout.flush()

    def _continue(self):
        """Loads the progress of an unfinished run; ends the script if it is one of other constants or code."""
        progress = load_file(self.progress_path, self.script)
        differing = differences(progress.get("recipe", {}), self.recipe)
        if differing:
            start = f"{self.progress_path} is an unfinished run with other constants or code (then, now): {differing}"
            raise SystemExit(f"{start}. Restore them to go on, or delete {self.progress_path.name}.")
        for key, part in self.parts.items():
            part.load_state_dict(progress[key])
        self.curve = progress["curve"]
        print(f"Continuing the unfinished run after epoch {len(self.curve)} of {self.epoch_count}.")

    def epochs(self):
        """Yields the numbers of the epochs still to do; ends each with a line and the progress on the disk."""
        for epoch in range(len(self.curve), self.epoch_count):
            entropy = [data.TRAINING, self.seed, epoch, RANK]
            seed_random_numbers(int(np.random.default_rng(entropy).integers(2**63)))
            self.network.train()
            self.totals.zero_()
            started = time.perf_counter()
            yield epoch
            self._end_epoch(epoch, started)

    @torch.no_grad()
    def update(self, loss, logits, labels):
        """Adds a batch to the epoch's figures, without waiting for the device."""
        cross_entropy = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        labelled = (labels >= 0).sum()
        images = torch.full_like(loss, len(labels))
        self.totals += torch.stack([loss * images, cross_entropy, correct, labelled, images])

    def _end_epoch(self, epoch, started):
        average_over_processes(self.totals)
        loss, cross_entropy, correct, labelled, images = self.totals.tolist()  # waits for the device
        rate = WORLD_SIZE * images / (time.perf_counter() - started)
        if not math.isfinite(loss):
            raise SystemExit(f"Training diverged in epoch {epoch + 1}: lower LEARNING_RATE in {self.script}.")
        if self.hold_out or epoch + 1 == self.epoch_count:
            renew_statistics(self.network, data.batches(self.train, self.batch_size, epoch, self.seed))
        average_over_processes(*filter(torch.is_floating_point, self.network.buffers()))
        figures = {
            "epoch": epoch + 1,
            "loss": loss / images,
            "cross_entropy": cross_entropy / labelled,
            "accuracy": correct / labelled,
        }
        means = "loss {loss:.3f}, cross-entropy {cross_entropy:.3f}, accuracy {accuracy:.2%}".format_map(figures)
        line = f"epoch {epoch + 1:3}/{self.epoch_count}: {means}"
        if self.hold_out:
            logits = predict(self.network, self.hold_out)
            figures["hold_out_accuracy"] = accuracy(logits, self.hold_out.labels)
            line += f", hold-out {figures['hold_out_accuracy']:.2%}"
        seconds = time.perf_counter() - started
        seconds_before = self.curve[-1]["seconds"] if self.curve else 0.0
        self.curve.append(figures | {"seconds": seconds_before + seconds})
        line += f", {rate:,.0f} images/s"
        left = self.epoch_count - len(self.curve)
        if left:
            progress = {"recipe": self.recipe, "curve": self.curve}
            for key, part in self.parts.items():
                progress[key] = part.state_dict()
            write_atomically(self.progress_path, lambda file: torch.save(progress, file))
            line += f", about {left * seconds / 60:.1f} min left"
        print(line, flush=True)

    def save(self):
        """Saves the checkpoint and removes the progress. Ends the script where epochs are left, as after a break."""
        if len(self.curve) < self.epoch_count:
            done = f"{len(self.curve)} of {self.epoch_count} epochs were done, so nothing is saved"
            raise SystemExit(f"{self.name}: {done}. To stop earlier, lower EPOCHS in {self.script}.")
        save_checkpoint(self.name, self.network, self.train, self.recipe, self.curve)
        if RANK == 0:
            self.progress_path.unlink(missing_ok=True)
        print(f"Saved {self.checkpoint_path} after {self.curve[-1]['seconds']:.0f} s.", flush=True)


# ---- Files -----------------------------------------------------------------------------------------------------------


def checkpoint_dir(dataset):
    """Where the checkpoints teacher.pt, student.pt and distilled.pt, and what belongs to them, are kept."""
    return data.path_from("CHECKPOINT_DIR", CHECKPOINT_DIR) / dataset


@torch.no_grad()
def save_checkpoint(name, network, train, recipe, curve=()):
    """Saves the network's weights and answers, and what it was trained on and how. curve: see `Run`."""
    network.cpu()  # any machine can load it then
    source = f"The network of {name}.pt"
    content = {
        "format": FORMAT,
        "network": "teacher" if name == "teacher" else "student",
        "state_dict": network.state_dict(),
        "answers": check_logits(network, len(train.classes), source),
        "dataset": train.dataset,
        "size": data.SIZE,
        "image_hashes": data.image_hashes(train.images),
        "classes": list(train.classes),
        "recipe": {"images": train.fingerprint} | plain(recipe),
        "curve": list(curve),
    }
    network.to(train.labels.device)
    write_atomically(checkpoint_dir(train.dataset) / f"{name}.pt", lambda file: torch.save(content, file))


def load_checkpoint(name, dataset, split=None):
    """The trained network of that name in eval mode, on the split's device or the CPU, and all its checkpoint says.

    dataset: the name of the checkpoints' folder. Ends the script with one sentence where it is missing, has other
    classes, is of other code than now, or, with a hold-out, was trained on other images than now.
    """
    path = checkpoint_dir(dataset) / f"{name}.pt"
    script = SCRIPTS[name]
    again = f"delete it and run python {script} again"
    if not path.exists():
        raise SystemExit(f"There is no {path}: run python {script} first.")
    checkpoint = load_file(path, script)
    if checkpoint.get("format") != FORMAT:
        raise SystemExit(f"{path} is of another version of models.py: {again}.")
    if checkpoint["size"] != data.SIZE:
        size = checkpoint["size"]
        raise SystemExit(f"{path} is for images of {size}x{size} pixels, but SIZE = {data.SIZE} in data.py.")
    network = rebuild(checkpoint, path, again).to(memory_format=torch.channels_last)
    if split:
        if tuple(checkpoint["classes"]) != split.classes:
            raise SystemExit(f"{path} was trained on other classes than {dataset} has now: {again}.")
        recipe = checkpoint["recipe"]
        if split.fingerprint not in (None, recipe["images"]):
            message = f"{path} was trained on other images than {dataset} has now, with HOLD_OUT = {data.HOLD_OUT}"
            message += f" and TRAIN_IMAGES = {data.TRAIN_IMAGES}"
            if data.HOLD_OUT and recipe.get("HOLD_OUT") != data.HOLD_OUT:
                raise SystemExit(f"{message}, so perhaps on the hold-out: run python {script} again, or save it again.")
            print(f"{message}.")
        network.to(split.labels.device)
    return network, checkpoint


@torch.no_grad()
def rebuild(checkpoint, path, again):
    """The network of a checkpoint, in eval mode; ends the script where models.py makes another one than it holds, which
    answers otherwise than that did when it was saved: shapes alone would not tell.
    """
    kind = checkpoint["network"]
    classes = len(checkpoint["classes"])
    network = {"teacher": teacher, "student": student}[kind](classes)
    edited = f"{kind}() in models.py makes another network than {path} holds: undo the edit, or {again}."
    try:
        network.load_state_dict(checkpoint["state_dict"])
    except RuntimeError:  # other names or shapes
        raise SystemExit(edited) from None
    answers = check_logits(network, classes, f"The network of {path}")
    apart = (answers - checkpoint["answers"]).abs().max()
    if not apart <= TOLERANCE * answers.abs().max():
        raise SystemExit(edited)
    return network


def write_atomically(path, write):
    """Calls write(file) on a temporary file that then becomes `path`, on rank 0: a crash leaves the old or the new."""
    if RANK > 0:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        raise SystemExit(f"{path} could not be written ({error}): make room, or change CHECKPOINT_DIR.") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path, script):
    """What torch.save wrote to path, on the CPU. Ends the script where it cannot be read: `script` writes it anew."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises nearly anything on a damaged file
        message = f"{path} cannot be read ({type(error).__name__}): delete it and run python {script} again."
        raise SystemExit(message) from None


# ---- What a training was ---------------------------------------------------------------------------------------------


def check_constants(constants):
    """Ends a script, whose globals() are given, where a number in it, data.py or models.py is out of its LIMITS."""
    if "__file__" not in constants:
        raise SystemExit("Run a script as a file, as in python distill.py: a checkpoint tells which code made it.")
    for names in (vars(data), globals(), constants):
        for name in LIMITS.keys() & names.keys():
            value = names[name]
            least, most = LIMITS[name]
            if type(value) not in (int, type(least)) or not least <= value <= most:
                wanted = "a whole number" if type(least) is int else "a number"
                file = Path(names["__file__"]).name
                raise SystemExit(f"{name} = {value!r} in {file} must be {wanted} from {least:g} to {most}.")


def make_recipe(constants, train, optimizer, schedule):
    """What decides how a network is trained, to be compared: images and precision, the files that train it (see
    `recipe_of_files`; constants: globals() of its script), the optimizer's and the schedule's class, and all plain
    values of the optimizer's groups.
    """
    recipe = {"images": train.fingerprint, "precision": str(precision(train.labels.device))}
    unlabelled = train.images[train.labels < 0]
    if len(unlabelled):
        recipe["unlabelled"] = data.fingerprint(unlabelled)
        recipe["unlabelled images"] = len(unlabelled)
    recipe |= recipe_of_files(vars(data), globals(), constants)
    recipe["optimizer"] = type(optimizer).__name__
    recipe["schedule"] = type(schedule).__name__
    for number, group in enumerate(optimizer.param_groups):
        for key, value in plain(group).items():
            recipe[f"{key} of group {number}"] = value
    return recipe


def recipe_of_files(*files):
    """The constants of files, whose globals() are given, by value, and a hash of what else each file says; then hashes
    of the user's own modules: what is loaded from below this folder, but for tests and installed packages.
    """
    recipe = {}
    for names in files:
        constants = plain({name: value for name, value in names.items() if name.isupper()})
        recipe |= constants
        path = Path(names["__file__"])
        recipe[path.name] = code_hash(path, constants)
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "").resolve()
        if path.suffix == ".py" and path.is_file() and path.is_relative_to(ROOT):
            key = path.relative_to(ROOT).as_posix()
            if key not in OUR_FILES and not key.startswith("tests/") and "site-packages" not in key:
                recipe.setdefault(key, code_hash(path))
    for name in NOT_IN_RECIPE:
        recipe.pop(name, None)
    return recipe


def plain(values):
    """The entries that JSON can hold, as it gives them back: numbers, strings, None, lists, dictionaries of these."""
    kept = {}
    for name, value in values.items():
        with contextlib.suppress(TypeError, ValueError):
            kept[name] = json.loads(json.dumps(value), parse_constant=str)  # a string for infinity, which JSON has not
    return kept


def code_hash(path, constants=()):
    """8 hexadecimal digits of the lines of a file but those that assign constants."""
    text = path.read_text("utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.partition(" = ")[0] not in constants]
    return data.fingerprint(lines)[:8]


def differences(first, second, left_out=()):
    """The entries in which two recipes differ, with both values: "EPOCHS (20, 1), GRAD_CLIP (absent, 1.0)"."""
    named = []
    for name in first | second:
        then = first.get(name, "absent")
        now = second.get(name, "absent")
        if then != now and name not in left_out:
            named.append(f"{name} ({then}, {now})")
    return ", ".join(named)
