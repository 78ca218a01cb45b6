"""The networks, and what every script does with one: device, optimizer, checkpoints, resumable training."""

import csv
import datetime
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
from data import ImageSet, check_constants

TEACHER_WIDTHS = (24, 64, 256, 256)  # channels: of the stem, then of each stage, which halves the resolution
STUDENT_WIDTHS = (24, 16, 64, 96)  # a tenth of the teacher's parameters and multiply-accumulates, at most
MOMENTUM = 0.9  # of SGD, Nesterov's
MUON_MOMENTUM = 0.6  # of Muon
MUON_SCALE = 22.0  # Muon turns a kernel by LEARNING_RATE * MUON_SCALE / sqrt(steps) radians a step, at the peak
WARM_UP = 0.2  # share of the steps over which the learning rate rises to its peak, before it falls to 0
BFLOAT16 = True  # bfloat16 products where the processor has them, twice as fast; False: float32 everywhere, no TF32
CHECKPOINT_DIR = "checkpoints"  # beside this file unless absolute; or CHECKPOINT_DIR in the environment

SCRIPTS = {"teacher": "train_teacher.py", "student": "train_student.py", "distilled": "distill.py"}


# Networks: anything that maps [B, 3, 32, 32] to [B, classes] can be returned by teacher() or student() ---------------


def teacher(classes: int, widths: tuple[int, ...] | None = None) -> nn.Module:
    """The high-capacity network; widths are given when it is rebuilt from a checkpoint."""
    return ConvNet(classes, widths or TEACHER_WIDTHS)


def student(classes: int, widths: tuple[int, ...] | None = None) -> nn.Module:
    """The lightweight network, the same whether it learns alone or from a teacher."""
    return ConvNet(classes, widths or STUDENT_WIDTHS)


class ConvNet(nn.Module):
    """Maps images [B, 3, 32, 32] to logits [B, classes], in the shape of airbench94 (Jordan 2024, arXiv:2404.00498).

    A 2x2 convolution, stages that halve the resolution with two 3x3 convolutions, global max pooling, a linear layer.
    """

    def __init__(self, classes: int, widths: tuple[int, ...]):
        super().__init__()
        self.widths = tuple(widths)  # a checkpoint keeps them, to rebuild the network
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


def new_network(name: str, train: ImageSet, seed: int) -> nn.Module:
    """A `teacher` or `student` on the images' device, with fresh weights that follow from the seed alone."""
    torch.manual_seed(seed)
    classes = len(train.classes)
    network = globals()[name](classes)
    with torch.no_grad():
        shape = tuple(network.eval()(torch.zeros(2, 3, data.SIZE, data.SIZE)).shape)  # gives lazy layers their shapes
    if shape != (2, classes):
        raise SystemExit(f"{name}() in models.py must map [2, 3, 32, 32] to logits {[2, classes]}, not {list(shape)}.")
    return network.to(train.labels.device, memory_format=torch.channels_last)


# Device, precision, optimizer -----------------------------------------------------------------------------------------


def setup() -> torch.device:
    """What every script calls first. Returns its device: CUDA if available, else the CPU.

    A process that torchrun started joins the others here; only rank 0 prints.
    """
    check_constants(__file__, globals())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"torchrun must start one process per GPU, {torch.cuda.device_count()} at most here.")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = BFLOAT16
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        if not torch.distributed.is_initialized():
            backend = "nccl" if device.type == "cuda" and torch.distributed.is_nccl_available() else "gloo"
            timeout = datetime.timedelta(hours=1)  # rank 0 may have to download the images
            torch.distributed.init_process_group(backend, timeout=timeout)
        if data.processes()[0] > 0:
            sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may have letters that a console has not
    return device


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`. Ctrl-C ends it with one sentence."""
    try:
        main()
    except KeyboardInterrupt:
        if data.processes()[0] == 0:
            print("\nInterrupted. To go on, run the same command again.", file=sys.stderr)
        sys.exit(130)
    if data.processes()[1] > 1:
        torch.distributed.destroy_process_group()  # not after a failure: it could wait for the other ranks forever


@functools.cache
def has_bfloat16(device_type: str) -> bool:
    """Whether the device computes in bfloat16 itself, as far as this torch can tell: emulated, it would be slow."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)


def precision(device: torch.device) -> torch.dtype:
    """Of convolutions and matrix products."""
    return torch.bfloat16 if BFLOAT16 and has_bfloat16(device.type) else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Inside it a network computes with the device's `precision`; its weights and its loss are float32 all the same."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum; in parameter groups with `muon=True`, Muon for kernels [outputs, inputs, H, W].

    Muon's step, as a matrix [outputs, inputs * H * W], is replaced by the nearest one with orthogonal rows, so that few
    large directions do not drown the others (Jordan et al. 2024, kellerjordan.github.io/posts/muon). Before it the
    kernel's norm is reset to sqrt(outputs): the learning rate is an angle, and weight decay would do nothing.
    torch.optim.Muon is for matrices.
    """

    batch_size = 1  # this process's images in the step: its weight in the mean of several processes' gradients

    @torch.no_grad()
    def step(self) -> None:
        if data.processes()[1] > 1:
            self._average_gradients()
        for group in self.param_groups:
            kernels = [kernel for kernel in group["params"] if group["muon"] and kernel.grad is not None]
            if not kernels:
                continue
            gradients = [kernel.grad for kernel in kernels]
            for kernel in kernels:
                self.state[kernel].setdefault("momentum_buffer", torch.zeros_like(kernel))
                kernel.grad = None  # the rest is SGD's
            buffers = [self.state[kernel]["momentum_buffer"] for kernel in kernels]
            torch._foreach_mul_(buffers, MUON_MOMENTUM)
            torch._foreach_add_(buffers, gradients)
            steps = torch._foreach_add(gradients, buffers, alpha=MUON_MOMENTUM)
            steps = [orthogonalise(step.flatten(1)).view_as(step) for step in steps]
            scales = torch._foreach_norm(kernels)
            torch._foreach_clamp_min_(scales, 1e-7)
            torch._foreach_reciprocal_(scales)
            torch._foreach_mul_(scales, [len(kernel) ** 0.5 for kernel in kernels])
            torch._foreach_mul_(kernels, scales)
            torch._foreach_sub_(kernels, steps, alpha=group["lr"])
        super().step()

    def _average_gradients(self) -> None:
        """Over all processes, each weighted by its images: the gradients of the mean loss over the whole batch."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        shared = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_ones(1)])
        shared *= self.batch_size
        torch.distributed.all_reduce(shared)
        means = (shared[:-1] / shared[-1]).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means):
            gradient.copy_(mean.view_as(gradient))


def orthogonalise(matrix: Tensor) -> Tensor:
    """[M, N], whose singular values are all near 1 and whose singular vectors are those of matrix [M, N].

    By three steps of the Newton-Schulz iteration with the coefficients of Jordan et al. 2024, in matrix products alone.
    """
    wide = matrix.mT if len(matrix) > matrix.shape[1] else matrix
    wide = (wide / (wide.norm() + 1e-7)).to(precision(matrix.device))  # singular values of 1 at most
    for _ in range(3):
        product = wide @ wide.mT
        inner = torch.addmm(product, product, product, beta=-4.7750, alpha=2.0315)
        wide = torch.addmm(wide, inner, wide, beta=3.4445)
    return (wide.mT if len(matrix) > matrix.shape[1] else wide).to(matrix.dtype)


def make_optimizer(
    network: nn.Module, learning_rate: float, weight_decay: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """`Muon`, and its schedule: linear warm-up to learning_rate, linear decay to 0.

    Muon is for the kernels of a `Stage`, whose lengths do not matter since a normalisation follows. The fewer steps,
    the more each of them turns a kernel, so that one learning_rate suits short and long trainings: turns in random
    directions add up as the square root of their number. Everything else, in any network, is SGD's, with weight decay
    on all but biases and normalisation.
    """
    stages = [module for module in network.modules() if isinstance(module, Stage)]
    kernels = {kernel for stage in stages for kernel in (stage.conv1.weight, stage.conv2.weight)}
    rest = [parameter for parameter in network.parameters() if parameter not in kernels]
    angle = learning_rate * MUON_SCALE / max(1, steps) ** 0.5
    groups = [
        {"params": [p for p in network.parameters() if p in kernels], "lr": angle, "weight_decay": 0.0, "muon": True},
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay, "muon": False},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0, "muon": False},
    ]
    optimizer = Muon(groups, lr=learning_rate, momentum=MOMENTUM, nesterov=True)
    warmup_steps = max(1, round(WARM_UP * steps))
    decay_steps = max(1, steps - warmup_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup_steps + 1), (steps - step) / decay_steps)
    )
    return optimizer, schedule


@torch.inference_mode()
def predict(network: nn.Module, split: ImageSet, mirror: bool = False) -> Tensor:
    """The network's logits for the images as they are, float32 [N, classes], in eval mode.

    With mirror, the mean of those for each image and for its mirror image.
    """
    device, training = split.labels.device, network.training
    whole = torch.zeros(len(split), len(split.classes), device=device)
    batch_size = 2000 if device.type == "cuda" else 125  # what fills a GPU, what fits a CPU's cache
    network.eval()
    with autocast(device), tqdm(total=len(split), unit=" images", disable=data.bar_disabled(), leave=False) as bar:
        for images, _, positions in data.batches(split, batch_size):
            logits = network(images).float()
            if mirror:
                logits = (logits + network(images.flip(3)).float()) / 2
            whole[positions] = logits
            bar.update(len(positions) * data.processes()[1])
    network.train(training)
    if data.processes()[1] > 1:
        torch.distributed.all_reduce(whole)  # each row is 0 in all processes but one
    return whole


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows of logits [N, classes] whose largest entry is at the label [N]."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


# Files: tensors and plain values only, so that reading one executes nothing -------------------------------------------


def checkpoint_path(dataset: str, name: str) -> Path:
    """Where the checkpoint of that name, "teacher", "student" or "distilled", is kept."""
    folder = Path(os.environ.get("CHECKPOINT_DIR") or Path(__file__).parent / CHECKPOINT_DIR)
    return folder / dataset / f"{name}.pt"


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Calls write(file) on a temporary file beside path, flushes it to the disk and renames it, on rank 0.

    So path is either whole or as it was, whenever the power goes. Ends the script with one sentence where it cannot.
    """
    if data.processes()[0] > 0:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch.save reports a full disk
        raise SystemExit(
            f"{path} could not be written ({error}): make room, or set CHECKPOINT_DIR elsewhere."
        ) from None


def read(path: Path) -> dict | None:
    """What torch.save wrote to path, on the CPU: {} where that is no dictionary of tensors and plain values, None where
    there is no file. Of several processes all get what rank 0 reads."""
    content = None
    if data.processes()[0] == 0 and path.exists():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except PermissionError as error:
            raise SystemExit(f"{path} may not be read: {error}.") from None
        except Exception:  # torch raises nearly anything on a damaged file
            content = {}
        content = content if isinstance(content, dict) else {}
    if data.processes()[1] > 1:
        torch.distributed.broadcast_object_list(box := [content])
        content = box[0]
    return content


def save_checkpoint(
    name: str, network: nn.Module, train: ImageSet, recipe: dict, seconds: float = 0.0, curve: Iterable[dict] = ()
) -> Path:
    """Saves all that it takes to rebuild the network, to use it and to know what it was trained on and how.

    seconds: of training. curve: one dictionary per epoch, see `Run`.
    """
    content = {
        "network": "teacher" if name == "teacher" else "student",
        "widths": network.widths if isinstance(network, ConvNet) else None,
        "state_dict": {key: value.cpu() for key, value in network.state_dict().items()},  # any machine can load it
        "dataset": train.dataset,
        "fingerprint": train.fingerprint,
        "images": len(train),
        "classes": list(train.classes),
        "mean": list(train.mean),
        "std": list(train.std),
        "recipe": recipe,
        "seconds": seconds,
        "curve": list(curve),
    }
    path = checkpoint_path(train.dataset, name)
    write_atomically(path, lambda file: torch.save(content, file))
    return path


def load_checkpoint(name: str, dataset: str, split: ImageSet | None = None) -> tuple[nn.Module, dict]:
    """The trained network of that name in eval mode, on the split's device or the CPU, and all its checkpoint says.

    Ends the script with one sentence where there is none, or one of other classes than the split's.
    """
    path, script = checkpoint_path(dataset, name), SCRIPTS[name]
    checkpoint = read(path)
    if checkpoint is None:
        raise SystemExit(f"There is no {path} yet: run python {script} first.")
    needed = ("network", "classes", "widths", "state_dict", "fingerprint", "images", "mean", "std", "recipe", "seconds")
    try:
        kind, classes, widths, state_dict, *_ = (checkpoint[key] for key in needed)
        make = {"teacher": teacher, "student": student}[kind]
        network = make(len(classes), widths) if widths else make(len(classes))
        network.load_state_dict(state_dict)
    except (KeyError, RuntimeError, TypeError):
        raise SystemExit(
            f"{path} is damaged, or holds another network than models.py makes now: "
            f"change that back, or run python {script} again."
        ) from None
    if split and tuple(classes) != split.classes:
        raise SystemExit(f"{path} was trained on other classes than {dataset} has now: run python {script} again.")
    if split and split.fingerprint not in ("", checkpoint["fingerprint"]):
        print(
            f"{path} was trained on other images than {dataset} has now with HOLD_OUT = {data.HOLD_OUT} "
            f"({len(split):,}; then {checkpoint['images']:,}). It may know hold-out images: run python {script} again."
        )
    device = split.labels.device if split else "cpu"
    return network.to(device, memory_format=torch.channels_last).eval(), checkpoint


# Training: what the three training loops share ------------------------------------------------------------------------


def make_recipe(file: str, constants: dict, device: torch.device) -> dict:
    """The constants of a training script, checked, with the others that decide what the training does."""
    shared = check_constants(data.__file__, vars(data)) | check_constants(__file__, globals())
    how = {"precision": str(precision(device)).removeprefix("torch."), "processes": data.processes()[1]}
    return check_constants(file, constants) | shared | how


def differences(first: dict, second: dict) -> str:
    """The entries in which two recipes differ, with both values: "EPOCHS (20 and 1), HOLD_OUT (0 and 1000)"."""
    names = [name for name in first | second if first.get(name) != second.get(name)]
    return ", ".join(f"{name} ({first.get(name)} and {second.get(name)})" for name in names)


class Run:
    """One network's training: its epochs, its progress on the screen and on the disk, its checkpoint at the end.

    The progress is saved after every epoch but the last, in a file that belongs to the recipe. A killed run continues
    from there; on the CPU it ends in the same weights. curve: for each epoch the means of the loss that is trained on,
    of the cross-entropy on the labels and of the accuracy over the training views, and the accuracy on the hold-out.
    """

    def __init__(self, name, network, optimizer, schedule, recipe, train: ImageSet, hold_out: ImageSet | None):
        self.name, self.network, self.optimizer, self.train, self.hold_out = name, network, optimizer, train, hold_out
        self.parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
        layers = repr(network), {key: value.shape for key, value in network.state_dict().items()}
        self.recipe = recipe | {"images": train.fingerprint, "layers": data.fingerprint(layers)[:8]}
        self.epoch_count, batch_size = recipe["EPOCHS"], recipe["BATCH_SIZE"]
        world_size = data.processes()[1]
        if batch_size > len(train) or world_size > len(train) // data.batch_count(len(train), batch_size):
            raise SystemExit(
                f"BATCH_SIZE = {batch_size} in {SCRIPTS[name]} must be at most {len(train)}, the number of training "
                f"images, and at least one image for each of {world_size} processes."
            )
        self.curve = []
        path = checkpoint_path(train.dataset, name)
        self.progress_path = path.with_name(f"{name}.{data.fingerprint(self.recipe)[:8]}.progress.pt")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{path.parent} (CHECKPOINT_DIR) cannot be made: {error}.") from None
        self._continue()
        self.first = len(self.curve)
        self.started = time.perf_counter() - (self.curve[-1]["seconds"] if self.curve else 0)  # as if in one go
        parameters, device = sum(parameter.numel() for parameter in network.parameters()), train.labels.device.type
        where = f"cpu (threads: {torch.get_num_threads()})" if device == "cpu" else device
        where = f"{world_size} x {where}" if world_size > 1 else where
        print(f"{name}: {parameters:,} parameters, {len(train):,} images of {train.dataset}, {where}", flush=True)

    def epochs(self) -> Iterator[int]:
        """Yields the numbers of the epochs still to do; ends each with a line and the progress on the disk."""
        self.training_started = time.perf_counter()
        for self.epoch in range(self.first, self.epoch_count):
            self.network.train()
            yield self.epoch
            self._end_epoch()

    def progress(self, batches: Iterable) -> Iterator:
        """Yields the batches, with a bar of what `update` adds up where the output is a terminal."""
        self.totals = torch.zeros(4, dtype=torch.float64, device=self.train.labels.device)
        self.epoch_started, world_size = time.perf_counter(), data.processes()[1]
        title, seen, estimated = f"epoch {self.epoch + 1}/{self.epoch_count}", 0, self.epoch > self.first
        with tqdm(total=len(self.train), desc=title, unit=" images", disable=data.bar_disabled(), leave=False) as bar:
            for batch in batches:
                self.optimizer.batch_size = len(batch[1])
                yield batch
                seen += len(batch[1]) * world_size
                if bar.update(len(batch[1]) * world_size):  # true where it is time to draw: only then wait for the GPU
                    bar.set_postfix_str(self._line() + self._time_left(seen), refresh=False)
                if not estimated and time.perf_counter() - self.epoch_started > 15:
                    estimated = True
                    tqdm.write(f"{self.name}: {self._line()} after {seen:,} images{self._time_left(seen)}")
        if world_size > 1:
            averaged = [value for value in self.network.buffers() if value.is_floating_point()]  # running statistics
            for value in (self.totals, *averaged):
                torch.distributed.all_reduce(value)
                value /= world_size

    @torch.no_grad()
    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch to the epoch's figures, without waiting for the device."""
        cross_entropy, correct = F.cross_entropy(logits.float(), labels), (logits.argmax(1) == labels).float().mean()
        self.totals += torch.stack([loss, cross_entropy, correct, torch.ones_like(loss)]) * len(labels)

    def save(self) -> None:
        """Saves the checkpoint and the learning curve (CSV) and removes the progress."""
        seconds = time.perf_counter() - self.started
        path = save_checkpoint(self.name, self.network, self.train, self.recipe, seconds, self.curve)
        if data.processes()[0] == 0:
            self.progress_path.unlink(missing_ok=True)
            try:
                with open(path.with_suffix(".csv"), "w", newline="") as file:
                    csv.writer(file).writerows([self.curve[0], *(line.values() for line in self.curve)])
            except OSError as error:  # it only informs: the checkpoint holds the same
                print(f"{path.with_suffix('.csv')} could not be written: {error}.")
        print(f"Saved {path} after {seconds:.0f} s.", flush=True)

    def _means(self) -> dict[str, float]:
        """Of what `update` added up in the epoch so far; waits for the device."""
        return dict(zip(("loss", "cross_entropy", "accuracy"), (self.totals[:3] / self.totals[3]).tolist()))

    def _line(self) -> str:
        return "loss {loss:.3f}, cross-entropy {cross_entropy:.3f}, accuracy {accuracy:.2%}".format(**self._means())

    def _time_left(self, seen: int) -> str:
        """About how long this script still takes, from its own epochs and the `seen` images of this one."""
        done = self.epoch - self.first + seen / len(self.train)
        seconds = (time.perf_counter() - self.training_started) / done * (self.epoch_count - self.first - done)
        return f", about {math.ceil(seconds / 60)} min left" if seconds > 0 else ""

    def _end_epoch(self) -> None:
        means = self._means()
        rate = len(self.train) / (time.perf_counter() - self.epoch_started)
        if not math.isfinite(means["loss"]) or not all(weight.isfinite().all() for weight in self.network.parameters()):
            raise SystemExit(
                f"The loss or a weight is no longer finite in epoch {self.epoch + 1}: "
                f"LEARNING_RATE = {self.recipe['LEARNING_RATE']} in {SCRIPTS[self.name]} is probably too high."
            )
        line, hold_out_accuracy = self._line(), None
        if self.hold_out:
            hold_out_accuracy = accuracy(predict(self.network, self.hold_out), self.hold_out.labels)
            line += f", hold-out {hold_out_accuracy:.2%}"
        means |= {"hold_out_accuracy": hold_out_accuracy, "seconds": time.perf_counter() - self.started}
        self.curve.append({"epoch": self.epoch + 1, **means})
        if self.epoch + 1 < self.epoch_count:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"recipe": self.recipe, "curve": self.curve, "random": torch.get_rng_state()}
            if self.totals.is_cuda:
                state["cuda_random"] = torch.cuda.get_rng_state()
            write_atomically(self.progress_path, lambda file: torch.save(state, file))
        line += f", {rate:,.0f} images/s{self._time_left(len(self.train))}"
        print(f"epoch {self.epoch + 1:3}/{self.epoch_count}: {line}", flush=True)

    def _continue(self) -> None:
        """Loads the progress of this recipe; names unfinished runs with other constants."""
        for path in sorted(self.progress_path.parent.glob(f"{self.name}.*.progress.pt")):
            if path != self.progress_path and data.processes()[1] == 1:  # ranks that see other files would deadlock
                differing = differences((read(path) or {}).get("recipe", {}), self.recipe)
                print(f"{path} is an unfinished run that had other constants; its and today's: {differing}.")
                print("With its constants it would go on. Delete it if it is not needed.")
        progress = read(self.progress_path)
        if progress is None:
            return
        if progress.get("recipe") != self.recipe:
            print(f"{self.progress_path} is damaged: starting from the first epoch.")
            return
        for name, part in self.parts.items():
            part.load_state_dict(progress[name])
        torch.set_rng_state(progress["random"])
        if "cuda_random" in progress:
            torch.cuda.set_rng_state(progress["cuda_random"])
        self.curve = progress["curve"]
        print(f"Continuing the unfinished run after epoch {len(self.curve)} of {self.epoch_count}.")
