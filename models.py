"""The networks, and what every script does with one: device, optimizer, checkpoints, resumable training.

Anything that maps images [B, 3, 32, 32], 0 to 1, to logits [B, classes] can be returned by teacher() or student().
"""

import ast
import contextlib
import datetime
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn
from tqdm.auto import tqdm

import data
from data import RANK, WORLD_SIZE, ImageSet

TEACHER_WIDTHS = (24, 64, 256, 256)  # channels: of the stem, then of each stage, which halves the resolution
STUDENT_WIDTHS = (24, 16, 64, 96)  # a tenth of the teacher's parameters and multiply-accumulates, at most
MOMENTUM = 0.9  # of SGD, Nesterov's
MUON_MOMENTUM = 0.6  # of Muon
MUON_SCALE = 175.0  # Muon's peak step turns a kernel by about LEARNING_RATE * MUON_SCALE / steps^0.75 radians
WARM_UP = 0.2  # share of the steps over which the learning rate rises to its peak, before it falls to 0
BFLOAT16 = True  # bfloat16 products where the processor has them, twice as fast; False: float32 everywhere, no TF32
CHECKPOINT_DIR = "checkpoints"  # beside this file unless absolute; or CHECKPOINT_DIR in the environment

PREDICTION_BATCH = {"cuda": 2000, "cpu": 125}  # images: what fills a GPU, what fits a CPU's cache
SCRIPTS = {"teacher": "train_teacher.py", "student": "train_student.py", "distilled": "distill.py"}
FORMAT = 2  # of checkpoints, which hold tensors and plain values only; networks of format 1 took normalised images


def teacher(classes: int) -> nn.Module:
    """The high-capacity network."""
    return ConvNet(classes, TEACHER_WIDTHS)


def student(classes: int) -> nn.Module:
    """The lightweight network, the same whether it learns alone or from a teacher."""
    return ConvNet(classes, STUDENT_WIDTHS)


class ConvNet(nn.Module):
    """Maps images [B, 3, 32, 32], 0 to 1, to logits [B, classes], in the shape of airbench94 (Jordan 2024,
    arXiv:2404.00498): a 2x2 convolution, stages of two 3x3 convolutions, global max pooling, a linear layer.
    """

    def __init__(self, classes: int, widths: tuple[int, ...]):
        super().__init__()
        if not (isinstance(widths, tuple) and 2 <= len(widths) <= 4 and all(type(w) is int and w > 0 for w in widths)):
            raise SystemExit(f"Widths in models.py must be tuples of 2 to 4 whole numbers of at least 1, not {widths}.")
        self.widths = widths  # a checkpoint keeps them, to rebuild the network
        self.stem = nn.Conv2d(3, widths[0], kernel_size=2)
        self.stages = nn.Sequential(*(Stage(inputs, outputs) for inputs, outputs in zip(widths, widths[1:])))
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        normalised = (images - 0.5) * 4  # mean 0 and standard deviation 1, nearly, of most photographs
        features = self.stages(F.relu_(self.stem(normalised)))  # in place: less memory to pass over
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


def new_network(make: Callable[[int], nn.Module], train: ImageSet, seed: int) -> nn.Module:
    """What `teacher` or `student` makes, on the images' device, with fresh weights that follow from the seed alone.

    Under torchrun hooks average each gradient over all processes, whose shares of a batch weigh the same. Unlike
    DistributedDataParallel they leave no wrapper that a script could forget to call.
    """
    torch.manual_seed(seed)
    classes, source = len(train.classes), f"{make.__name__}() in models.py"
    network = make(classes)
    check_logits(network, classes, source)  # which also gives lazy layers their shapes
    with torch.random.fork_rng([]):
        check_logits(make(classes), classes, source, training=True)
    network.to(train.labels.device, memory_format=torch.channels_last)
    if WORLD_SIZE > 1:
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda parameter: average_over_processes(parameter.grad))
    return network


def check_logits(network: nn.Module, classes: int, source: str, training: bool = False) -> None:
    """Ends the script with one sentence about `source` unless the network, put into that mode, returns logits."""
    logits = None
    if isinstance(network, nn.Module):
        with torch.no_grad():
            images = torch.zeros(2, 3, data.SIZE, data.SIZE, device=next(network.parameters(), torch.empty(0)).device)
            logits = network.train(training)(images)
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SystemExit(f"{source} must map images [2, 3, 32, 32] to logits [2, {classes}], not to {found}.")


def setup() -> torch.device:
    """What every script calls first. Returns its device: CUDA if available, else the CPU.

    A process that torchrun started joins the others here; only rank 0 prints.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"torchrun must start one process per GPU, {torch.cuda.device_count()} at most here.")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = BFLOAT16
    if data.LAUNCHED and not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" and torch.distributed.is_nccl_available() else "gloo"
        timeout = datetime.timedelta(hours=1)  # rank 0 may have to download the images
        torch.distributed.init_process_group(backend, timeout=timeout)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may have letters that a console has not
    return device


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`. Ctrl-C ends it with one sentence."""
    try:
        main()
    except KeyboardInterrupt:
        if RANK == 0:
            print("\nInterrupted. To go on, run the same command again.", file=sys.stderr)
        sys.exit(130)
    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()  # not after a failure: it could wait for the other ranks forever


def average_over_processes(*tensors: Tensor) -> None:
    """Replaces each tensor by its mean over all processes, if there are several."""
    for tensor in tensors if WORLD_SIZE > 1 else ():
        torch.distributed.all_reduce(tensor)
        tensor /= WORLD_SIZE


def precision(device: torch.device) -> torch.dtype:
    """Of convolutions and matrix products: bfloat16 if the device itself has it; emulated, it would be slow."""
    has_bfloat16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if BFLOAT16 and has_bfloat16 else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """Inside it a network computes with the device's `precision`; its weights and its loss are float32 all the same."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(device) == torch.bfloat16)


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum; for a `Stage`'s kernels Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Muon replaces a kernel's step, as a matrix [outputs, inputs * H * W], by the nearest one with orthogonal rows, so
    that few large directions do not drown the others. Before it the kernel's norm is reset to sqrt(outputs), which
    changes nothing since a normalisation follows: the learning rate is an angle. It is smaller the more steps there are,
    from 288 to 4,800. These kernels, biases and norms have no weight decay. torch.optim.Muon takes matrices only.
    """

    def __init__(self, network: nn.Module, learning_rate: float, weight_decay: float, steps: int):
        stages = [module for module in network.modules() if isinstance(module, Stage)]
        kernels = {kernel for stage in stages for kernel in (stage.conv1.weight, stage.conv2.weight)}
        parameters = list(network.parameters())
        angle = learning_rate * MUON_SCALE / max(288, min(steps, 4800)) ** 0.75
        groups = [
            {"params": [p for p in parameters if p in kernels], "lr": angle, "momentum": 0.0, "nesterov": False},
            {"params": [p for p in parameters if p not in kernels and p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p not in kernels and p.ndim <= 1]},
        ]
        super().__init__(groups, learning_rate, momentum=MOMENTUM, nesterov=True)

    @torch.no_grad()
    def step(self) -> None:
        for kernel in self.param_groups[0]["params"]:
            if kernel.grad is not None:
                state = self.state[kernel]
                if "muon_momentum" not in state:
                    state["muon_momentum"] = torch.zeros_like(kernel)
                state["muon_momentum"].mul_(MUON_MOMENTUM).add_(kernel.grad)
                step = kernel.grad.add(state["muon_momentum"], alpha=MUON_MOMENTUM)
                kernel.grad = orthogonalise(step.flatten(1)).view_as(step)
                kernel.mul_(len(kernel) ** 0.5 / kernel.norm().clamp(min=1e-7))
        super().step()


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix [M, N] with the singular vectors of `matrix` and with singular values near 1.

    By three Newton-Schulz steps with the coefficients of Jordan et al. 2024, which are matrix products alone.
    """
    nearer = (matrix / (matrix.norm() + 1e-7)).to(precision(matrix.device))  # singular values of 1 at most
    for _ in range(3):
        product = nearer @ nearer.mT
        inner = torch.addmm(product, product, product, beta=-4.7750, alpha=2.0315)
        nearer = torch.addmm(nearer, inner, nearer, beta=3.4445)
    return nearer.to(matrix.dtype)


def make_schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Scales the optimizer's learning rates, whatever they are: linear warm-up to them, linear decay to 0."""
    warmup_steps = max(1, round(WARM_UP * steps))
    decay_steps = max(1, steps - warmup_steps)
    return LambdaLR(optimizer, lambda step: min((step + 1) / (warmup_steps + 1), (steps - step) / decay_steps))


@torch.no_grad()
def predict(name: str, network: nn.Module, split: ImageSet, mirror: bool = False) -> Tensor:
    """The network's logits for the images as they are, float32 [N, classes]; leaves it in eval mode.

    With mirror, the mean of those for each image and for its mirror image. Ends the script with one sentence, with that
    name in it, where they are not finite.
    """
    device = split.labels.device
    whole = torch.zeros(len(split), len(split.classes), device=device)
    network.eval()
    with autocast(device), tqdm(total=len(split), **data.BAR) as bar:
        for images, _, positions in data.batches(split, PREDICTION_BATCH[device.type]):
            logits = network(images).float()
            if mirror:
                logits = (logits + network(images.flip(3)).float()) / 2
            whole[positions] = logits
            bar.update(len(positions) * WORLD_SIZE)
    if WORLD_SIZE > 1:
        torch.distributed.all_reduce(whole)  # each row is 0 in all processes but one
    if not whole.isfinite().all():
        raise SystemExit(f"The {name}'s logits are not finite: wrong weights, or too high a rate in {SCRIPTS[name]}.")
    return whole


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows of logits [N, classes] whose largest entry is at the label [N]."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def checkpoint_dir(dataset: str) -> Path:
    """Where the checkpoints teacher.pt, student.pt and distilled.pt, and what belongs to them, are kept."""
    return data.path_from("CHECKPOINT_DIR", CHECKPOINT_DIR) / dataset


def write_atomically(path: Path, write: Callable) -> None:
    """Calls write(file) on a temporary file, flushes that to the disk and renames it to path, on rank 0.

    After a crash the file is either the old one or the new one.
    """
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
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_if_there(path: Path) -> dict | None:
    """What torch.save wrote to path, on the CPU; None where there is no file, {} where it is damaged."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise SystemExit(f"{path} cannot be read: {error}.") from None
    except Exception:  # torch raises nearly anything on a damaged file
        return {}
    return content if isinstance(content, dict) else {}


def save_checkpoint(name: str, network: nn.Module, train: ImageSet, recipe: dict, curve: Iterable[dict] = ()) -> None:
    """Saves all that it takes to rebuild the network and to know what it was trained on and how. curve: see `Run`."""
    check_logits(network, len(train.classes), f"The network of {name}.pt")
    content = {
        "format": FORMAT,
        "network": "teacher" if name == "teacher" else "student",
        "widths": network.widths if isinstance(network, ConvNet) else None,
        "state_dict": {key: value.cpu() for key, value in network.state_dict().items()},  # any machine can load it
        "dataset": train.dataset,
        "fingerprint": train.fingerprint,
        "classes": list(train.classes),
        "recipe": recipe,
        "curve": list(curve),
    }
    write_atomically(checkpoint_dir(train.dataset) / f"{name}.pt", lambda file: torch.save(content, file))


def load_checkpoint(name: str, dataset: str, split: ImageSet | None = None) -> tuple[nn.Module, dict]:
    """The trained network of that name in eval mode, on the split's device or the CPU, and all its checkpoint says.

    Ends the script with one sentence where there is none, or one of other classes than the split's.
    """
    path, script = checkpoint_dir(dataset) / f"{name}.pt", SCRIPTS[name]
    checkpoint = load_if_there(path)
    if checkpoint is None:
        raise SystemExit(f"There is no {path}: run python {script} first.")
    try:
        if checkpoint["format"] != FORMAT:
            raise KeyError
        make = {"teacher": teacher, "student": student}[checkpoint["network"]]
        classes, widths = checkpoint["classes"], checkpoint["widths"]
        network = make(len(classes))
        if widths and not (isinstance(network, ConvNet) and network.widths == widths):  # models.py was edited since
            network = ConvNet(len(classes), widths)
        network.load_state_dict(checkpoint["state_dict"])
    except (KeyError, RuntimeError, TypeError):
        way_out = f"restore models.py, or run python {script} again"
        raise SystemExit(f"{path} is damaged, or holds another network than models.py makes now: {way_out}.") from None
    check_logits(network, len(classes), f"The network of {path}")
    if split and tuple(classes) != split.classes:
        raise SystemExit(f"{path} was trained on other classes than {dataset} has now: run python {script} again.")
    if split and split.fingerprint not in ("", checkpoint["fingerprint"]):
        print(f"{path} was trained on other images than {dataset} has now, with HOLD_OUT = {data.HOLD_OUT}.")
        print(f"It may have been trained on hold-out images: train it again (python {script}), or save it again.")
    device = split.labels.device if split else "cpu"
    return network.to(device, memory_format=torch.channels_last).eval(), checkpoint


LIMITS = {  # constant: type, least, most
    "HOLD_OUT": (int, 0, math.inf),
    "SHIFT": (int, 0, data.SIZE - 1),
    "SEED": (int, 0, 2**63 - 1),
    "EPOCHS": (int, 1, math.inf),
    "BATCH_SIZE": (int, 2 * WORLD_SIZE - 1, math.inf),  # then every process has an image of every batch
    "LEARNING_RATE": (float, 1e-12, 1e35),
    "WEIGHT_DECAY": (float, 0, 1e38),
    "LABEL_SMOOTHING": (float, 0, 1),
    "TEMPERATURE": (float, 0.1, 100),  # beyond, float32 keeps too few digits of the loss
    "KD_WEIGHT": (float, 0, 1),
}
NOT_IN_RECIPE = ("DATASET", "SYNTHETIC_IMAGES", "TEACHER_WIDTHS", "STUDENT_WIDTHS")  # `Run` adds "images" and "layers"
NOT_IN_RECIPE += ("DATA_DIR", "CHECKPOINT_DIR", "DOWNLOAD_TIMEOUT", "PREDICTION_BATCH", "BAR", "LAUNCHED", "RANK")
NOT_IN_RECIPE += ("SCRIPTS", "FORMAT", "LIMITS", "NOT_IN_RECIPE")  # these and the line above do not change a training


def make_recipe(constants: dict, device: torch.device) -> dict:
    """What decides how a network is trained: the constants of its script, whose globals() are given, those of data.py
    and models.py, and the precision. Ends the script with one sentence where a number is out of its limits."""
    recipe = {"precision": str(precision(device)).removeprefix("torch.")}
    for names in (vars(data), globals(), constants):
        for name, value in names.items():
            if name in LIMITS:
                kind, low, high = LIMITS[name]
                if type(value) not in (int, kind) or not low <= value <= high:
                    wanted, file = "a whole number" if kind is int else "a number", Path(names["__file__"]).name
                    raise SystemExit(f"{name} = {value!r} in {file} must be {wanted} from {low} to {high}.")
            plain = value is None or isinstance(value, (int, float, str, tuple, list, dict))
            if name.isupper() and plain and name not in NOT_IN_RECIPE:
                finite = type(value) is float and math.isfinite(value)
                recipe[name] = value if finite or type(value) in (bool, int, str) else repr(value)
    return recipe


def differences(first: dict, second: dict) -> str:
    """The entries in which two recipes differ, with both values: "EPOCHS (20, 1), HOLD_OUT (0, 1000)"."""
    names = [name for name in first | second if first.get(name) != second.get(name)]
    return ", ".join(f"{name} ({first.get(name)}, {second.get(name)})" for name in names)


class Run:
    """One network's training: its epochs, its progress on the screen and on the disk, its checkpoint at the end.

    The progress is saved after every epoch but the last. A killed run continues from there; on the CPU it ends in the
    same weights. curve: for each epoch the means of the loss that is trained on, of the cross-entropy on the labels and
    of the accuracy over the training views, with a hold-out the accuracy on that, and the seconds of training so far.
    """

    def __init__(self, name, network, optimizer, schedule, recipe, train: ImageSet, hold_out: ImageSet | None):
        self.name, self.network, self.train, self.hold_out = name, network, train, hold_out
        self.parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
        layers = repr(network), {key: value.shape for key, value in network.state_dict().items()}
        self.recipe = recipe | {"images": train.fingerprint, "layers": data.fingerprint(layers)[:8]}
        files = [Path(__file__).with_name(file) for file in (SCRIPTS[name], "models.py", "data.py")]
        trees = {file.name: ast.dump(ast.parse(file.read_bytes())) for file in files}  # without comments
        self.begun_by = self.recipe | {file: data.fingerprint(tree)[:8] for file, tree in trees.items()}
        self.folder = checkpoint_dir(train.dataset)
        self.progress_path = self.folder / f"{name}.progress.pt"
        self.totals = torch.zeros(4, dtype=torch.float64, device=train.labels.device)  # of the epoch, see `update`
        self.bar = tqdm(disable=True)  # until the first epoch
        self.curve = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{self.folder} (CHECKPOINT_DIR) cannot be made: {error}.") from None
        self._continue()
        size, where = sum(parameter.numel() for parameter in network.parameters()), train.labels.device.type
        print(f"{name}: {size:,} parameters, {len(train):,} images of {train.dataset}, on {where}", flush=True)

    def _continue(self) -> None:
        """Loads the progress of an unfinished run, if there is one that the same constants and code began."""
        progress = load_if_there(self.progress_path)
        if progress is None:
            return
        if not progress.keys() >= {"network", "optimizer", "schedule", "begun_by", "curve", "random"}:
            print(f"{self.progress_path} is damaged: starting from the first epoch.")
            return
        if differing := differences(progress["begun_by"], self.begun_by):
            start = f"{self.progress_path} is an unfinished run with other constants or code (then, now): {differing}"
            raise SystemExit(f"{start}. Restore them to go on, or delete {self.progress_path.name}.")
        for name, part in self.parts.items():
            part.load_state_dict(progress[name])
        torch.set_rng_state(progress["random"])
        self.curve = progress["curve"]
        print(f"Continuing the unfinished run after epoch {len(self.curve)} of {self.recipe['EPOCHS']}.")

    def epochs(self) -> Iterator[int]:
        """Yields the numbers of the epochs still to do; ends each with a line and the progress on the disk."""
        count, images, done = self.recipe["EPOCHS"], len(self.train), len(self.curve)
        with tqdm(total=count * images, initial=done * images, **data.BAR) as self.bar:
            for epoch in range(done, count):
                self.bar.set_description(f"epoch {epoch + 1}/{count}", refresh=False)
                self.network.train()
                self.totals.zero_()
                started = time.perf_counter()
                yield epoch
                self._end_epoch(epoch, started)

    @torch.no_grad()
    def update(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch to the epoch's figures, without waiting for the device."""
        cross_entropy, correct = F.cross_entropy(logits.float(), labels), (logits.argmax(1) == labels).float().mean()
        self.totals += torch.stack([loss, cross_entropy, correct, torch.ones_like(loss)]) * len(labels)
        if self.bar.update(len(labels) * WORLD_SIZE):  # true where it is time to draw: only then wait for the device
            self.bar.set_postfix(self._means(), refresh=False)

    def _means(self) -> dict[str, float]:
        return dict(zip(("loss", "cross_entropy", "accuracy"), (self.totals[:3] / self.totals[3]).tolist()))

    def _end_epoch(self, epoch: int, started: float) -> None:
        average_over_processes(self.totals)
        figures, left = self._means(), self.recipe["EPOCHS"] - epoch - 1
        rate = len(self.train) / (time.perf_counter() - started)
        if not left and all(module.training for module in self.network.modules()):  # unless some layers are frozen
            # Batch normalisation's statistics anew: after few steps the running ones still hold their first values.
            views = data.batches(self.train, self.recipe["BATCH_SIZE"], epoch, self.recipe["SEED"])
            with autocast(self.totals.device):
                update_bn(itertools.islice(views, 100), self.network)  # 100 batches tell as much as all
        average_over_processes(*(value for value in self.network.buffers() if value.is_floating_point()))
        if not math.isfinite(figures["loss"]) or not all(part.isfinite().all() for part in self.network.parameters()):
            raise SystemExit(f"Training diverged in epoch {epoch + 1}: lower LEARNING_RATE in {SCRIPTS[self.name]}.")
        line = "loss {loss:.3f}, cross-entropy {cross_entropy:.3f}, accuracy {accuracy:.2%}".format(**figures)
        if self.hold_out:
            logits = predict(self.name, self.network, self.hold_out)
            figures["hold_out_accuracy"] = accuracy(logits, self.hold_out.labels)
            line += f", hold-out {figures['hold_out_accuracy']:.2%}"
        taken, before = time.perf_counter() - started, self.curve[-1]["seconds"] if self.curve else 0.0
        self.curve.append({"epoch": epoch + 1, **figures, "seconds": before + taken})
        line += f", {rate:,.0f} images/s"
        if left:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"begun_by": self.begun_by, "curve": self.curve, "random": torch.get_rng_state()}
            write_atomically(self.progress_path, lambda file: torch.save(state, file))
            line += f", about {math.ceil(left * taken / 60)} min left"
        self.bar.clear()
        print(f"epoch {epoch + 1:3}/{epoch + 1 + left}: {line}", flush=True)

    def save(self) -> None:
        """Saves the checkpoint and removes the progress."""
        save_checkpoint(self.name, self.network, self.train, self.recipe, self.curve)
        if RANK == 0:
            self.progress_path.unlink(missing_ok=True)
        print(f"Saved {self.folder / self.name}.pt after {self.curve[-1]['seconds']:.0f} s.", flush=True)
