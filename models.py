"""The networks, and what every script does with one: device, optimizer, checkpoints, a run that survives its end."""

import atexit
import copy
import csv
import datetime
import hashlib
import io
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import data
from data import ImageSet, check, write_whole

TEACHER_WIDTHS = (24, 64, 256, 256)  # channels: of the stem, and of each stage at half the resolution of the last
STUDENT_WIDTHS = (24, 16, 64, 96)  # a tenth of the teacher's parameters and multiply-accumulates, at most
MOMENTUM = 0.9  # Nesterov's
MUON_MOMENTUM = 0.6  # the same, for kernels of convolutions
MUON_SHARE = 0.25  # of LEARNING_RATE: by how much a step turns such a kernel, in radians
WARM_UP = 0.2  # share of the steps over which the learning rate rises to its peak, before it falls to 0
BFLOAT16 = True  # the products in bfloat16 where the processor is made for it, as fast again; False: float32 everywhere
COMPILE = False  # torch.compile the network that is trained; needs a C++ compiler, and does not always pay
CHECKPOINT_DIR = "checkpoints"  # beside this file unless absolute; environment: CHECKPOINT_DIR

SCRIPTS = {"teacher": "train_teacher.py", "student": "train_student.py", "distilled": "distill.py"}  # who makes which


# Networks: anything that maps [B, 3, 32, 32] to [B, classes] can be returned by teacher() or student() ---------------


def teacher(classes: int, widths: tuple[int, ...] | None = None) -> nn.Module:
    """The high-capacity network; widths are given when it is rebuilt from a checkpoint."""
    return ConvNet(classes, widths or _checked("TEACHER_WIDTHS", TEACHER_WIDTHS))


def student(classes: int, widths: tuple[int, ...] | None = None) -> nn.Module:
    """The lightweight network, the same whether it learns alone or from a teacher."""
    return ConvNet(classes, widths or _checked("STUDENT_WIDTHS", STUDENT_WIDTHS))


class ConvNet(nn.Module):
    """Maps images [B, 3, 32, 32] to logits [B, classes], in the shape of airbench94 (Jordan 2024, arXiv:2404.00498).

    A stem looks at patches of 2x2 pixels; each stage halves the resolution and has two 3x3 convolutions; the maximum
    of each feature over the picture decides.
    """

    def __init__(self, classes: int, widths: tuple[int, ...]):
        super().__init__()
        self.widths = tuple(widths)
        self.stem = nn.Conv2d(3, widths[0], kernel_size=2)
        self.stages = nn.Sequential(*(Stage(inputs, outputs) for inputs, outputs in zip(widths, widths[1:])))
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(F.relu_(self.stem(images)))  # in place: less memory to pass over
        return self.head(F.adaptive_max_pool2d(features, 1).flatten(1)) / 9  # small logits: gentle first steps


class Stage(nn.Module):
    """[B, inputs, H, W] to [B, outputs, H // 2, W // 2]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        nn.init.dirac_(self.conv1.weight[:inputs])  # both start by passing on what comes in; the rest is random
        nn.init.dirac_(self.conv2.weight)

    def forward(self, features: Tensor) -> Tensor:
        features = F.relu_(self.norm1(F.max_pool2d(self.conv1(features), 2)))  # pooled first: a quarter to normalise
        return F.relu_(self.norm2(self.conv2(features)))


def _checked(name: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(widths, (tuple, list)) or not 2 <= len(widths) <= 5:
        raise SystemExit(f"{name} = {widths!r} in models.py must be two to five numbers of channels.")
    for width in widths:
        check("models.py", name, width, int, 1)
    return tuple(widths)


def new_network(name: str, train: ImageSet, seed: int) -> nn.Module:
    """A `teacher` or `student` on the images' device, with fresh weights that follow from the seed alone."""
    torch.manual_seed(seed)
    network = {"teacher": teacher, "student": student}[name](len(train.classes))
    device, several = train.labels.device, data.processes()[1] > 1
    if several and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # statistics of the whole batch; not on the CPU
    network.to(device, memory_format=torch.channels_last)
    if COMPILE:
        network.compile()
    return Shared(network) if several else network


# Device, precision, optimizer -----------------------------------------------------------------------------------------


def best_device() -> torch.device:
    """CUDA where there is one, else Apple's MPS, else the CPU. A process started by torchrun joins the others here."""
    device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        _join(device)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may have letters that a console has not
    return device


def _join(device: torch.device) -> None:
    if not torch.distributed.is_initialized():
        patience = datetime.timedelta(hours=1)  # the first process may have to download the images
        if device.type == "cuda":
            torch.distributed.init_process_group("nccl", timeout=patience, device_id=device)
        else:
            torch.distributed.init_process_group("gloo", timeout=patience)
        atexit.register(torch.distributed.destroy_process_group)
        if data.processes()[0] > 0:
            sys.stdout = open(os.devnull, "w")  # only the first one tells


class Shared(DistributedDataParallel):
    """A network that is trained by several processes at once, each on its share of every batch.

    DistributedDataParallel takes the mean of the processes' gradients. That of a mean loss over the whole batch is the
    mean weighted by the shares, which may differ by an image: the logits' gradients are weighted accordingly.
    """

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self.broadcast_buffers = False  # `Run` takes their mean after every epoch

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        whole = torch.full((), len(images), dtype=torch.float32, device=logits.device)
        torch.distributed.all_reduce(whole)
        weight = len(images) * data.processes()[1] / whole
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * weight)
        return logits


def precision(device: torch.device) -> str:
    """Of the convolutions and matrix products: bfloat16 where the device computes in it itself, else float32.

    Those are NVIDIA's GPUs since Ampere, and x86 processors with AVX512-BF16 (AMD since Zen 4, Intel's servers), as far
    as the torch at hand can tell. Elsewhere it would be emulated, and slow.
    """
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bfloat16" if native and BFLOAT16 else "float32"


def autocast(device: torch.device) -> torch.autocast:
    """Inside it a network computes with the device's `precision`; its weights and its loss are float32 all the same."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == "bfloat16")


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum, whose steps for the kernels of convolutions count all directions alike.

    Such a step, as a matrix [outputs, inputs * height * width], is replaced by the nearest one with orthogonal rows, so
    that few large directions do not drown the others (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    The kernel is held at one length: its learning rate is an angle, and weight decay has nothing to do. A convolution
    that looks at the image itself (inputs of 3 at most) is left to SGD. torch.optim.Muon is for matrices alone.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for kernel in group["params"]:
                if kernel.ndim == 4 and kernel.shape[1] > 3 and kernel.grad is not None:
                    state = self.state[kernel]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(kernel)
                    buffer = state["momentum_buffer"].mul_(MUON_MOMENTUM).add_(kernel.grad)
                    step = orthogonalise(kernel.grad.add(buffer, alpha=MUON_MOMENTUM).flatten(1))
                    kernel.mul_(len(kernel) ** 0.5 / kernel.norm().clamp(min=1e-7))
                    kernel.sub_(step.view_as(kernel), alpha=MUON_SHARE * group["lr"])
                    kernel.grad = None  # the rest is SGD's
        return super().step(closure)


def orthogonalise(matrix: Tensor) -> Tensor:
    """[M, N], whose singular values are all near 1 and whose singular vectors are those of matrix [M, N].

    By three steps of the Newton-Schulz iteration with the coefficients of Jordan et al. 2024, in matrix products alone.
    """
    wide = matrix.mT if len(matrix) > matrix.shape[1] else matrix
    wide = (wide / (wide.norm() + 1e-7)).to(getattr(torch, precision(matrix.device)))  # singular values of 1 at most
    for _ in range(3):
        product = wide @ wide.mT
        inner = torch.addmm(product, product, product, beta=-4.7750, alpha=2.0315)
        wide = torch.addmm(wide, inner, wide, beta=3.4445)
    return (wide.mT if len(matrix) > matrix.shape[1] else wide).to(matrix.dtype)


def make_optimizer(
    network: nn.Module, learning_rate: float, weight_decay: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """`Muon`, and its schedule: a straight line up to learning_rate, a straight line down to 0.

    Weight decay acts on the weights that `Muon` leaves to SGD, but for biases and normalisation.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = Muon(groups, lr=learning_rate, momentum=MOMENTUM, nesterov=True)
    rise = max(1, round(WARM_UP * steps))
    fall = max(1, steps - rise)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (rise + 1), (steps - step) / fall)
    )
    return optimizer, schedule


@torch.inference_mode()
def predict(network: nn.Module, split: ImageSet, epoch: int | None = None) -> Tensor:
    """The network's logits, float32 [N, classes], in eval mode: for the images as they are, or for an epoch's views."""
    device = split.labels.device
    network = fold(copy.deepcopy(network).eval())
    batch_size = 2000 if device.type == "cuda" else 125  # what fills a GPU, what fits a CPU's cache
    with autocast(device):
        own = [(network(images).float(), positions) for images, _, positions in data.batches(split, batch_size, epoch)]
    logits, positions = (torch.cat(parts) for parts in zip(*own))
    if data.processes()[1] == 1:
        return logits
    whole = logits.new_zeros(len(split), logits.shape[1])
    whole[positions] = logits
    torch.distributed.all_reduce(whole)  # each row is 0 in all processes but one
    return whole


def fold(network: nn.Module) -> nn.Module:
    """Moves the batch normalisations of every `Stage` into its convolutions, in place; for a network in eval mode.

    The answers stay the same up to rounding, for one pass over memory less. Other layers are left as they are.
    """
    for stage in [module for module in network.modules() if isinstance(module, Stage)]:
        stage.conv2, stage.norm2 = fuse_conv_bn_eval(stage.conv2, stage.norm2), nn.Identity()
        if (stage.norm1.weight > 0).all():  # what does not turn the order around does not change which is the maximum
            stage.conv1, stage.norm1 = fuse_conv_bn_eval(stage.conv1, stage.norm1), nn.Identity()
    return network


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows of logits [N, classes] whose largest entry is at the label [N]."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


# Files: tensors and plain values only, so that reading one executes nothing -------------------------------------------


def checkpoint_path(dataset: str, name: str) -> Path:
    """Where the checkpoint of that name, "teacher", "student" or "distilled", is kept."""
    return checkpoint_folder(dataset) / f"{name}.pt"


def checkpoint_folder(dataset: str) -> Path:
    given = os.environ.get("CHECKPOINT_DIR")
    check("models.py", "CHECKPOINT_DIR", CHECKPOINT_DIR, str)
    return (Path(given) if given else Path(__file__).parent / CHECKPOINT_DIR) / dataset


def save(path: Path, content: dict) -> None:
    """Writes content to path, whole or not at all."""
    write(path, lambda file: torch.save(content, file))


def write(path: Path, by: Callable[[BinaryIO], None]) -> None:
    """What by(file) writes, at path, whole or not at all; ends the script with one sentence where that cannot be."""
    try:
        write_whole(path, by)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        raise SystemExit(
            f"{path} could not be written ({error}): make room, or set CHECKPOINT_DIR elsewhere."
        ) from None


def read(path: Path) -> dict | None:
    """What `save` wrote to path, on the CPU; {} where the file is not one that it wrote, None where there is none.

    In several processes, what the first one reads.
    """
    content = None
    if data.processes()[0] == 0 and path.exists():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError):
            content = {}
        content = content if isinstance(content, dict) else {}
    if data.processes()[1] > 1:
        box = [content]
        torch.distributed.broadcast_object_list(box)
        content = box[0]
    return content


def save_checkpoint(
    name: str, network: nn.Module, train: ImageSet, recipe: dict, seconds: float, curve: Iterable[dict] = ()
) -> Path:
    """Saves all that it takes to rebuild the network, to use it and to know how it was trained.

    seconds: of training. curve: what `Run` tells of each epoch.
    """
    path = checkpoint_path(train.dataset, name)
    content = {
        "network": "teacher" if name == "teacher" else "student",
        "widths": getattr(network, "widths", None),
        "state_dict": network.state_dict(),
        "dataset": train.dataset,
        "classes": list(train.classes),
        "mean": list(train.mean),
        "std": list(train.std),
        "size": data.SIZE,
        "recipe": recipe,
        "seconds": seconds,
        "curve": list(curve),
    }
    save(path, content)
    return path


def load_checkpoint(
    name: str, dataset: str, classes: tuple[str, ...] | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict]:
    """The trained network of that name in eval mode, and all that its checkpoint says.

    Ends the script with one sentence where there is none, or one of other classes than those given.
    """
    path, script = checkpoint_path(dataset, name), SCRIPTS[name]
    checkpoint = read(path)
    if checkpoint is None:
        raise SystemExit(f"There is no {path} yet: run python {script} first.")
    needed = {"network", "widths", "state_dict", "dataset", "classes", "mean", "std", "recipe"}
    if not needed <= checkpoint.keys() or checkpoint["network"] not in ("teacher", "student"):
        raise SystemExit(f"{path} is damaged or not a checkpoint of this project: delete it and run python {script}.")
    classes = tuple(classes or checkpoint["classes"])
    if tuple(checkpoint["classes"]) != classes:
        raise SystemExit(f"{path} was trained on other classes than {dataset} has now: run python {script} again.")
    make = {"teacher": teacher, "student": student}[checkpoint["network"]]
    try:
        network = make(len(classes), checkpoint["widths"]) if checkpoint["widths"] else make(len(classes))
        network.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError):
        raise SystemExit(
            f"{path} holds another network than {make.__name__}() in models.py makes: "
            f"change that back, or run python {script} again."
        ) from None
    return network.to(device, memory_format=torch.channels_last).eval(), checkpoint


def fingerprint(network: nn.Module, *tensors: Tensor) -> str:
    """32 hexadecimal digits that follow from the network's layers and weights and from the tensors."""
    digest = hashlib.sha256(repr(network).encode())
    for tensor in (*network.state_dict().values(), *tensors):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


# Training: what all three loops need and nobody comes to read ---------------------------------------------------------

LIMITS = {  # constant: its type, the least and the most it may be
    "SEED": (int, 0, 2**63 - 1),
    "EPOCHS": (int, 1),
    "BATCH_SIZE": (int, 1),
    "LEARNING_RATE": (float, 0),
    "WEIGHT_DECAY": (float, 0),
    "LABEL_SMOOTHING": (float, 0, 1),
    "TEMPERATURE": (float, 0),
    "KD_WEIGHT": (float, 0, 1),
}
ABOVE_ZERO = {"LEARNING_RATE", "TEMPERATURE"}


def make_recipe(file: str, **constants) -> dict:
    """The constants of a training script, checked, with the others that decide what the training does."""
    for name, value in constants.items():
        check(Path(file).name, name, value, *LIMITS[name], open_low=name in ABOVE_ZERO)
    check("models.py", "MOMENTUM", MOMENTUM, float, 0, 1, open_low=True)
    check("models.py", "MUON_MOMENTUM", MUON_MOMENTUM, float, 0, 1)
    check("models.py", "MUON_SHARE", MUON_SHARE, float, 0, open_low=True)
    check("models.py", "WARM_UP", WARM_UP, float, 0, 1)
    check("models.py", "BFLOAT16", BFLOAT16, bool)
    check("models.py", "COMPILE", COMPILE, bool)
    shared = {name: globals()[name] for name in ("MOMENTUM", "MUON_MOMENTUM", "MUON_SHARE", "WARM_UP")}
    shared |= {name: getattr(data, name) for name in ("HOLD_OUT", "VIEW_SEED", "SHIFT")}
    return constants | shared | {"precision": precision(best_device()), "processes": data.processes()[1]}


class Run:
    """One network's training: its epochs, its progress on the screen and on the disk, its checkpoint at the end.

    The progress is saved after every epoch; a run that was killed continues there and ends in the same weights.
    """

    def __init__(self, name, network, optimizer, schedule, recipe, train: ImageSet, hold_out: ImageSet | None):
        self.name, self.optimizer, self.schedule = name, optimizer, schedule
        self.network = network.module if isinstance(network, Shared) else network
        self.recipe = recipe | {"widths": getattr(self.network, "widths", None)}
        self.train, self.hold_out = train, hold_out
        self.progress_path = checkpoint_folder(train.dataset) / f"{name}.progress.pt"
        self.first, self.epoch, self.seconds, self.curve = 0, 0, 0.0, []
        try:
            self.progress_path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{self.progress_path.parent} (CHECKPOINT_DIR) cannot be made: {error}.") from None
        if recipe["BATCH_SIZE"] > len(train):
            raise SystemExit(
                f"BATCH_SIZE = {recipe['BATCH_SIZE']} in {SCRIPTS[name]} must be at most {len(train)}, "
                f"the number of training images."
            )
        among = data.processes()[1]
        if among > len(train) // data.batch_count(len(train), recipe["BATCH_SIZE"]):
            raise SystemExit(
                f"BATCH_SIZE = {recipe['BATCH_SIZE']} in {SCRIPTS[name]} is too small for {among} processes."
            )
        self._continue()
        sys.excepthook = self._excepthook
        parameters, device = sum(parameter.numel() for parameter in network.parameters()), train.labels.device.type
        where = f"cpu (threads: {torch.get_num_threads()})" if device == "cpu" else device
        where = f"{among} x {where}" if among > 1 else where
        print(f"{name}: {parameters:,} parameters, {len(train):,} images of {train.dataset}, {where}", flush=True)

    def epochs(self) -> Iterator[int]:
        """Yields the numbers of the epochs still to do; ends each with a line and the progress on the disk."""
        for epoch in range(self.first, self.recipe["EPOCHS"]):
            started = time.perf_counter()
            self.epoch = epoch
            self.network.train()
            yield epoch
            self.seconds += time.perf_counter() - started
            self._end_epoch()

    def watch(self, batches: Iterable) -> Iterator:
        """Yields the batches, with a bar that shows what `record` is told where the output is a terminal."""
        self.loss = torch.zeros((), device=self.train.labels.device)
        self.right, self.seen = torch.zeros_like(self.loss, dtype=torch.int64), 0
        started = time.perf_counter()
        title = f"epoch {self.epoch + 1}/{self.recipe['EPOCHS']}"
        among = data.processes()[1]
        with tqdm(total=len(self.train), desc=title, unit=" images", disable=data.no_bar(), leave=False) as bar:
            for batch in batches:
                yield batch
                told = min(self.seen * among, len(self.train))  # of several processes this one knows its own share only
                if bar.update(told - bar.n):  # true where it is time to draw; only then is the device waited for
                    bar.set_postfix(self._figures(), refresh=False)
        if among > 1:
            self._unite(among)
        self.mean_loss = self.loss.item() / self.seen  # waits for the device, so the time is all of the epoch's
        self.images_per_second = self.seen / (time.perf_counter() - started)

    @torch.no_grad()
    def record(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch to the epoch's loss and accuracy, without waiting for the device."""
        self.loss += loss.detach() * len(labels)
        self.right += (logits.argmax(1) == labels).sum()
        self.seen += len(labels)

    def _unite(self, among: int) -> None:
        """Adds up what all processes have seen, and takes the mean of their batch statistics."""
        totals = torch.stack([self.loss.double(), self.right.double(), torch.full_like(self.loss.double(), self.seen)])
        torch.distributed.all_reduce(totals)
        self.loss, self.right, self.seen = totals[0], totals[1], int(totals[2].item())
        for buffer in self.network.buffers():
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer)
                buffer /= among

    def save(self) -> None:
        """Saves the checkpoint and removes the progress."""
        path = save_checkpoint(self.name, self.network, self.train, self.recipe, self.seconds, self.curve)
        if data.processes()[0] == 0:
            self.progress_path.unlink(missing_ok=True)
        sys.excepthook = sys.__excepthook__
        print(f"Saved {path} after {self.seconds:.0f} s of training.", flush=True)

    def _excepthook(self, kind, error, trace) -> None:
        if issubclass(kind, KeyboardInterrupt):
            where = f"after epoch {self.epoch}" if self.epoch else "from the start"
            if data.processes()[0] == 0:
                print(f"\nInterrupted. Run python {SCRIPTS[self.name]} again to continue {where}.", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    def _figures(self) -> dict[str, str]:
        return {
            "loss": f"{self.loss.item() / self.seen:.3f}",
            "accuracy": f"{100 * self.right.item() / self.seen:.1f} %",
        }

    def _end_epoch(self) -> None:
        epochs = self.recipe["EPOCHS"]
        if not math.isfinite(self.mean_loss):
            raise SystemExit(
                f"The loss is no longer finite in epoch {self.epoch + 1}: "
                f"LEARNING_RATE = {self.recipe['LEARNING_RATE']} in {SCRIPTS[self.name]} is probably too high."
            )
        figures, held = self._figures(), None
        if self.hold_out:
            held = accuracy(predict(self.network, self.hold_out), self.hold_out.labels)
            figures["hold-out"] = f"{100 * held:.2f} %"
        told = ", ".join(f"{name} {value}" for name, value in figures.items())
        print(f"epoch {self.epoch + 1:3}/{epochs}: {told}, {self.images_per_second:,.0f} images/s", flush=True)
        shown = {"loss": self.mean_loss, "accuracy": self.right.item() / self.seen, "hold_out_accuracy": held}
        self.curve.append({"epoch": self.epoch + 1, **shown, "seconds": self.seconds})
        self._write_curve()
        if self.epoch + 1 < epochs:
            progress = {name: part.state_dict() for name, part in self._parts().items()}
            state = {"epoch": self.epoch + 1, "seconds": self.seconds, "curve": self.curve}
            state["random"] = torch.get_rng_state()
            save(self.progress_path, progress | state | self._identity())

    def _write_curve(self) -> None:
        """One line per epoch of this run, those before an interruption included, in a CSV beside the checkpoint."""
        text = io.StringIO()
        table = csv.DictWriter(text, self.curve[0].keys(), lineterminator="\n")
        table.writeheader()
        table.writerows(self.curve)
        write(self.progress_path.with_name(f"{self.name}.csv"), lambda file: file.write(text.getvalue().encode()))

    def _continue(self) -> None:
        progress = read(self.progress_path)
        if progress is None:
            return
        identity = self._identity()
        if any(progress.get(name) != value for name, value in identity.items()):
            print(f"The unfinished run in {self.progress_path} had other constants or is damaged: starting afresh.")
            return
        for name, part in self._parts().items():
            part.load_state_dict(progress[name])
        torch.set_rng_state(progress["random"])
        self.first, self.seconds, self.curve = progress["epoch"], progress["seconds"], progress["curve"]
        print(f"Continuing the unfinished run after epoch {self.first} of {self.recipe['EPOCHS']}.")

    def _parts(self) -> dict:
        return {"network": self.network, "optimizer": self.optimizer, "schedule": self.schedule}

    def _identity(self) -> dict:
        return {
            "recipe": self.recipe,
            "layers": repr(self.network),
            "dataset": self.train.dataset,
            "classes": list(self.train.classes),
            "images": len(self.train),
        }
