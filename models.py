"""The networks, and what every script does with one: device, optimizer, checkpoints, resumable training.

Anything that maps images [B, 3, SIZE, SIZE], 0 to 1, to logits [B, classes] can be returned by teacher() or student().
"""

import ast
import contextlib
import glob
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

import data
from data import RANK, WORLD_SIZE, ImageSet

TEACHER_WIDTHS = (24, 64, 256, 256)  # channels: of the stem, then of each stage, which halves the resolution
STUDENT_WIDTHS = (24, 16, 64, 96)  # a tenth of the teacher's parameters and multiply-accumulates, at most
MOMENTUM = 0.9  # of SGD, Nesterov's
MUON_MOMENTUM = 0.6  # of Muon, Nesterov's too
MUON_SCALE = 175.0  # Muon turns a kernel by LEARNING_RATE * MUON_SCALE / steps**MUON_POWER radians at its peak
MUON_POWER = 0.75  # so the angle depends on how many steps the training has, by EPOCHS and BATCH_SIZE
MUON_STEPS = (288, 4800)  # but not on fewer or more than these, where it was measured: tests/experiments.md
WARM_UP = 0.2  # share of the steps over which the learning rate rises to its peak, before it falls to 0
BFLOAT16 = True  # bfloat16 products where the processor has them, up to twice as fast; False: float32, and no TF32
CHECKPOINT_DIR = "checkpoints"  # beside this file unless absolute; or CHECKPOINT_DIR in the environment

PREDICTION_BATCH = {"cuda": 2000, "cpu": 125}  # images: what fills a GPU, what fits a CPU's cache
SCRIPTS = {"teacher": "train_teacher.py", "student": "train_student.py", "distilled": "distill.py"}
FORMAT = 3  # of checkpoints, which hold tensors and plain values only
TOLERANCE = 1e-4  # of a saved network's answers, a share of the largest; rounding moved them by 5e-6, edits by 6e-4


def teacher(classes: int) -> nn.Module:
    """The high-capacity network."""
    return ConvNet(classes, TEACHER_WIDTHS)


def student(classes: int) -> nn.Module:
    """The lightweight network, the same whether it learns alone or from a teacher."""
    return ConvNet(classes, STUDENT_WIDTHS)


class ConvNet(nn.Module):
    """Maps images [B, 3, SIZE, SIZE], 0 to 1, to logits [B, classes], in the shape of airbench94 (Jordan 2024,
    arXiv:2404.00498): a 2x2 convolution, stages of two 3x3 convolutions, global max pooling, a linear layer.
    widths: channels of the first convolution, then of each stage.
    """

    def __init__(self, classes: int, widths: tuple[int, ...]):
        super().__init__()
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

    Another one is tried before: does it give logits, can it be trained? Under torchrun each gradient is averaged over
    all processes by hooks, which unlike DistributedDataParallel leave no wrapper that a script could forget to call.
    """
    classes, source = len(train.classes), f"{make.__name__}() in models.py"
    try:
        tried = make(classes)
        check_logits(tried, classes, source)
        check_logits(tried, classes, source, training=True).sum().backward()  # an error where all is frozen
        seed_random_numbers(seed)
        network = make(classes)
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in network.parameters()):
            check_logits(network, classes, source)  # gives lazy layers their shapes
    except Exception as error:  # of anybody's own network
        raise RuntimeError(f"{source} makes a network that fails as shown above.") from error
    network.to(train.labels.device, memory_format=torch.channels_last)
    if WORLD_SIZE > 1:
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda parameter: average_over_processes(parameter.grad))
    return network


def check_logits(network: nn.Module, classes: int, source: str, training: bool = False) -> Tensor:
    """The network's logits [2, classes] for two fixed pictures of random colours, in float32 on the CPU.

    Ends the script with one sentence about `source` if these are no logits. Leaves the network in the mode asked for.
    """
    blocks = np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32)  # of 8x8 pixels
    pictures = torch.from_numpy(blocks.repeat(8, 2).repeat(8, 3)[:, :, : data.SIZE, : data.SIZE])
    pictures = pictures.contiguous(memory_format=torch.channels_last)  # as in training
    logits = network.train(training)(pictures) if isinstance(network, nn.Module) else None
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        wanted = f"must map images {list(pictures.shape)} to logits [2, {classes}]"
        raise SystemExit(f"{source} {wanted}, not to {found}.")
    return logits


def seed_random_numbers(seed: int) -> None:
    """Seeds the generators of torch, on all devices, of Python and of numpy (whose seeds have 32 bits)."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def setup() -> torch.device:
    """What every script calls first: its device, CUDA if available. Processes of torchrun meet here; rank 0 prints."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = BFLOAT16
    if data.LAUNCHED and not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" and torch.distributed.is_nccl_available() else "gloo"
        torch.distributed.init_process_group(backend)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may have letters that a console has not
    return device


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; Ctrl-C ends it with one sentence."""
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
    """SGD with Nesterov momentum; for most convolutions Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Muon replaces a kernel's step, as a matrix [outputs, inputs * H * W], by the nearest one whose singular values are
    all the same, so that few large directions do not drown the others. It takes every `nn.Conv2d` without a bias, which
    a normalisation is expected to follow, but the first and those in groups. A kernel keeps the norm with which it
    starts, so the learning rate is an angle: with LEARNING_RATE = 0.1 it is 0.25 radians at the peak of 288 steps or
    fewer and 0.03 at that of 4,800 or more. Weight decay is for the other weights only, not for biases and norms.
    torch.optim.Muon takes matrices only.
    """

    def __init__(self, network: nn.Module, learning_rate: float, weight_decay: float, steps: int):
        self.norms = {}  # kernel: its norm
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        for convolution in convolutions[1:]:
            kernel = convolution.weight
            normalised = convolution.bias is None and convolution.groups == 1
            if normalised and isinstance(kernel, nn.Parameter) and kernel.any():  # one of zeros could not turn
                self.norms[kernel] = kernel.detach().norm()
        others = [parameter for parameter in network.parameters() if parameter not in self.norms]
        fewest, most = MUON_STEPS
        angle = learning_rate * MUON_SCALE / max(fewest, min(steps, most)) ** MUON_POWER
        groups = [
            {"params": list(self.norms), "lr": angle, "momentum": MUON_MOMENTUM},
            {"params": [parameter for parameter in others if parameter.ndim > 1], "weight_decay": weight_decay},
            {"params": [parameter for parameter in others if parameter.ndim <= 1]},
        ]
        super().__init__(groups, learning_rate, momentum=MOMENTUM, nesterov=True)

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for kernel, norm in self.norms.items():
            if kernel.grad is None:
                continue
            if not self.state[kernel]:
                self.state[kernel]["momentum_buffer"] = torch.zeros_like(kernel)
            momentum = self.state[kernel]["momentum_buffer"]
            momentum.mul_(group["momentum"]).add_(kernel.grad)
            step = kernel.grad.add(momentum, alpha=group["momentum"]).flatten(1)
            turn = orthogonalise(step).reshape(kernel.shape) * (norm / min(step.shape) ** 0.5)
            kernel.mul_(norm / kernel.norm().clamp(min=1e-7))
            kernel.sub_(turn, alpha=group["lr"])
            kernel.grad = None  # done: what is left is for SGD
        super().step()


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix [M, N] with the singular vectors of `matrix`, and with singular values of 0.25 to 1.25 where those of
    `matrix` are within a factor of ten; smaller ones stay smaller. By three Newton-Schulz steps (Jordan et al. 2024).
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.mT).mT  # the product below is the smaller one
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

    With mirror, the mean of those for each image and for its mirror image. Ends the script where they are not finite.
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
    if not whole.isfinite().all():
        raise SystemExit(f"The {name}'s logits are not finite: wrong weights, or too high a rate in {SCRIPTS[name]}.")
    return whole


def parameter_count(network: nn.Module) -> int:
    """How many numbers the network learns."""
    return sum(parameter.numel() for parameter in network.parameters())


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows of logits [N, classes] whose largest entry is at the label [N]."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def checkpoint_dir(dataset: str) -> Path:
    """Where the checkpoints teacher.pt, student.pt and distilled.pt, and what belongs to them, are kept."""
    return data.path_from("CHECKPOINT_DIR", CHECKPOINT_DIR) / dataset


def write_atomically(path: Path, write: Callable) -> None:
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
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_if_there(path: Path) -> dict | None:
    """What torch.save wrote to path, on the CPU; None where there is no file, {} where it cannot be read."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise SystemExit(f"{path} cannot be read: {error}.") from None
    except Exception:  # torch raises nearly anything on a damaged file
        return {}
    return content if isinstance(content, dict) else {}


@torch.no_grad()
def save_checkpoint(name: str, network: nn.Module, train: ImageSet, recipe: dict, curve: Iterable[dict] = ()) -> None:
    """Saves the network's weights and answers, and what it was trained on and how. curve: see `Run`."""
    network.cpu()  # any machine can load it then
    first, second = (check_logits(network, len(train.classes), f"The network of {name}.pt") for _ in range(2))
    content = {
        "format": FORMAT,
        "network": "teacher" if name == "teacher" else "student",
        "state_dict": network.state_dict(),
        "answers": first if torch.equal(first, second) else None,  # of a network that answers at random
        "dataset": train.dataset,
        "size": data.SIZE,
        "image_hashes": data.image_hashes(train.images),
        "classes": list(train.classes),
        "recipe": {"images": train.fingerprint} | plain(recipe),
        "curve": list(curve),
    }
    network.to(train.labels.device)
    write_atomically(checkpoint_dir(train.dataset) / f"{name}.pt", lambda file: torch.save(content, file))


@torch.no_grad()
def load_checkpoint(name: str, dataset: str, split: ImageSet | None = None) -> tuple[nn.Module, dict]:
    """The trained network of that name in eval mode, on the split's device or the CPU, and all its checkpoint says.

    dataset: the name of the checkpoints' folder. Ends the script with one sentence where it is missing, has other
    classes, does not answer as it did when it was saved, or, with a hold-out, was trained on other images than now.
    """
    path, script = checkpoint_dir(dataset) / f"{name}.pt", SCRIPTS[name]
    checkpoint = load_if_there(path)
    if checkpoint is None:
        moved = moved_from(path.parent, split.fingerprint) if split else ""
        raise SystemExit(f"There is no {path}: run python {script} first.{moved}")
    if checkpoint.get("format") != FORMAT:
        what = "is of another version of models.py" if checkpoint else "is damaged"
        raise SystemExit(f"{path} {what}: run python {script} again.")
    kind, classes, saved, size = (checkpoint[key] for key in ("network", "classes", "answers", "size"))
    if size != data.SIZE:
        raise SystemExit(f"{path} is for images of {size}x{size} pixels, but SIZE = {data.SIZE} in data.py.")
    network = {"teacher": teacher, "student": student}[kind](len(classes))
    edited = f"{kind}() in models.py makes another network than {path} holds: undo the edit, or run python {script}."
    try:
        network.load_state_dict(checkpoint["state_dict"])
    except RuntimeError:  # other names or shapes
        raise SystemExit(edited) from None
    answers = check_logits(network, len(classes), f"The network of {path}")
    if saved is not None and not (answers - saved).abs().max() <= TOLERANCE * saved.abs().max():
        raise SystemExit(edited)
    if split and tuple(classes) != split.classes:
        raise SystemExit(f"{path} was trained on other classes than {dataset} has now: run python {script} again.")
    if split and split.fingerprint not in ("", checkpoint["recipe"]["images"]):
        message = f"{path} was trained on other images than {dataset} has now, with HOLD_OUT = {data.HOLD_OUT}"
        message += f" and TRAIN_IMAGES = {data.TRAIN_IMAGES}"
        if data.HOLD_OUT:
            raise SystemExit(f"{message}, so perhaps on the hold-out: run python {script} again, or save it again.")
        print(f"{message}.")
    return network.to(split.labels.device if split else "cpu", memory_format=torch.channels_last), checkpoint


def moved_from(folder: Path, fingerprint: str) -> str:
    """A sentence that names a folder of checkpoints of the same images, made at another path; "" without one."""
    name = glob.escape(folder.name.rpartition("-")[0])
    for path in folder.parent.glob(f"{name}-*/*.pt"):
        if path.parent != folder and (load_if_there(path) or {}).get("recipe", {}).get("images") == fingerprint:
            return f" {path.parent} holds networks of the same images: to go on with them, rename it to {folder.name}."
    return ""


LIMITS = {  # constant: type, least, most
    "HOLD_OUT": (int, 0, math.inf),
    "TRAIN_IMAGES": (int, 0, math.inf),
    "SIZE": (int, 16, 256),
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
NOT_IN_RECIPE = (  # constants that change no training, or that "images" and "layers" stand for, which `Run` adds
    *("DATASET", "DATA_DIR", "SYNTHETIC_IMAGES", "LAUNCHED", "RANK", "BAR"),
    *("TEACHER_WIDTHS", "STUDENT_WIDTHS", "CHECKPOINT_DIR", "PREDICTION_BATCH", "SCRIPTS", "FORMAT", "TOLERANCE"),
    *("LIMITS", "NOT_IN_RECIPE"),
)


def make_recipe(constants: dict, device: torch.device) -> dict:
    """What decides how a network is trained: the precision, the constants of its script, whose globals() are given, of
    data.py and of models.py, and a hash of the code of these files. Ends the script with one sentence where a number is
    out of its limits."""
    recipe = {"precision": str(precision(device)).removeprefix("torch.")}
    files = [vars(data), globals(), constants]
    for names in files:
        for name in LIMITS.keys() & names.keys():
            kind, low, high = LIMITS[name]
            if type(names[name]) not in (int, kind) or not low <= names[name] <= high:
                wanted, file = "a whole number" if kind is int else "a number", Path(names["__file__"]).name
                raise SystemExit(f"{name} = {names[name]!r} in {file} must be {wanted} from {low} to {high}.")
        recipe |= plain({name: names[name] for name in names if name.isupper() and name not in NOT_IN_RECIPE})
    return recipe | {Path(names["__file__"]).name: code_hash(names["__file__"], recipe) for names in files}


def plain(values: dict) -> dict:
    """The entries that JSON can hold, as it gives them back: numbers, strings, None, lists, dictionaries of these."""
    kept = {}
    for name, value in values.items():
        with contextlib.suppress(TypeError, ValueError):
            kept[name] = json.loads(json.dumps(value), parse_constant=str)  # a string for infinity, which JSON has not
    return kept


def code_hash(file: str, recipe: dict) -> str:
    """8 hexadecimal digits of what the code in a file says, the same under every version of Python.

    Comments, docstrings and assignments of constants that the recipe holds, or NOT_IN_RECIPE names, do not count.
    """
    tree, left_out = ast.parse((Path(__file__).parent / file).read_bytes()), {*recipe, *NOT_IN_RECIPE}
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            bare = [part for part in node.body if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)]
            node.body = [part for part in node.body if part not in bare]  # without docstrings
    for node in tree.body[:]:
        if isinstance(node, ast.Assign) and {getattr(target, "id", None) for target in node.targets} <= left_out:
            tree.body.remove(node)
    said = re.sub(r"\w+=(\[\]|Load\(\))|[ ,]", "", ast.dump(tree))  # Python 3.13 leaves these empty fields out
    return data.fingerprint(said)[:8]


def differences(first: dict, second: dict) -> str:
    """The entries in which two recipes differ, with both values: "EPOCHS (20, 1), HOLD_OUT (0, 1000)"."""
    names = [name for name in first | second if first.get(name) != second.get(name)]
    names = [name for name in names if " of group " not in name] or names  # groups mostly follow from the constants
    return ", ".join(f"{name} ({first.get(name)}, {second.get(name)})" for name in names)


class Run:
    """One network's training: its epochs, its progress on the screen and on the disk, its checkpoint at the end.

    The progress is saved after every epoch but the last. A killed run continues from there; on the CPU it ends in the
    same weights, since all random numbers of an epoch follow from SEED, the epoch and the process alone.
    curve: for each epoch the means of the loss that is trained on, of the cross-entropy on the labels and of the
    accuracy over the training views, with a hold-out the accuracy on that, and the seconds of training so far.
    """

    def __init__(self, name, network, optimizer, schedule, recipe, train: ImageSet, hold_out: ImageSet | None):
        self.name, self.network, self.train, self.hold_out = name, network, train, hold_out
        self.parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
        layers = {key: list(getattr(value, "shape", ())) for key, value in network.state_dict().items()}
        self.recipe = recipe | {"images": train.fingerprint, "layers": data.fingerprint(layers)[:8]}
        self.recipe |= {key: type(self.parts[key]).__name__ for key in ("optimizer", "schedule")}
        for number, group in enumerate(optimizer.param_groups):
            self.recipe |= {f"{key} of group {number}": value for key, value in plain(group).items() if value}
        self.checkpoint_path = checkpoint_dir(train.dataset) / f"{name}.pt"
        self.progress_path = self.checkpoint_path.with_suffix(".progress.pt")
        self.totals = torch.zeros(4, dtype=torch.float64, device=train.labels.device)  # of the epoch, see `update`
        self.curve = []
        folder = self.checkpoint_path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{folder} (CHECKPOINT_DIR) cannot be made: {error}.") from None
        self._continue()
        size, where = parameter_count(network), train.labels.device.type
        print(f"{name}: {size:,} parameters, {len(train):,} images of {train.dataset}, on {where}", flush=True)

    def _continue(self) -> None:
        """Loads the progress of an unfinished run, if there is one that the same constants and code began."""
        progress = load_if_there(self.progress_path)
        if progress is None:
            if not self.checkpoint_path.exists():
                if moved := moved_from(self.checkpoint_path.parent, self.train.fingerprint):
                    print(f"{self.name}: a new training.{moved}")
            return
        if not progress.keys() >= {*self.parts, "recipe", "curve"}:
            print(f"{self.progress_path} is damaged: starting from the first epoch.")
            return
        if differing := differences(progress["recipe"], self.recipe):
            start = f"{self.progress_path} is an unfinished run with other constants or code (then, now): {differing}"
            raise SystemExit(f"{start}. Restore them to go on, or delete {self.progress_path.name}.")
        for name, part in self.parts.items():
            part.load_state_dict(progress[name])
        self.curve = progress["curve"]
        print(f"Continuing the unfinished run after epoch {len(self.curve)} of {self.recipe['EPOCHS']}.")

    def epochs(self) -> Iterator[int]:
        """Yields the numbers of the epochs still to do; ends each with a line and the progress on the disk."""
        for epoch in range(len(self.curve), self.recipe["EPOCHS"]):
            words = data.TRAINING, self.recipe["SEED"], epoch, RANK
            seed_random_numbers(int(np.random.default_rng(words).integers(2**63)))
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

    def _end_epoch(self, epoch: int, started: float) -> None:
        average_over_processes(self.totals)
        means, left = (self.totals[:3] / self.totals[3]).tolist(), self.recipe["EPOCHS"] - epoch - 1
        figures = dict(zip(("loss", "cross_entropy", "accuracy"), means))
        rate = len(self.train) / (time.perf_counter() - started)
        if not left:
            self._renew_statistics(epoch)
        average_over_processes(*(value for value in self.network.buffers() if value.is_floating_point()))
        self._check_finite(figures["loss"], epoch)
        line = "loss {loss:.3f}, cross-entropy {cross_entropy:.3f}, accuracy {accuracy:.2%}".format(**figures)
        if self.hold_out:
            logits = predict(self.name, self.network, self.hold_out)
            figures["hold_out_accuracy"] = accuracy(logits, self.hold_out.labels)
            line += f", hold-out {figures['hold_out_accuracy']:.2%}"
        taken, before = time.perf_counter() - started, self.curve[-1]["seconds"] if self.curve else 0.0
        self.curve.append({"epoch": epoch + 1, **figures, "seconds": before + taken})
        line += f", {rate:,.0f} images/s"
        if left:
            self._save_progress()
            seconds = math.ceil(left * taken)
            line += f", about {seconds} s left" if seconds < 120 else f", about {math.ceil(seconds / 60)} min left"
        print(f"epoch {epoch + 1:3}/{epoch + 1 + left}: {line}", flush=True)

    def _renew_statistics(self, epoch: int) -> None:
        """Batch normalisation's statistics anew: after few steps the running ones still hold their first values."""
        if all(module.training for module in self.network.modules()):  # unless some layers are frozen
            views = data.batches(self.train, self.recipe["BATCH_SIZE"], epoch, self.recipe["SEED"])
            with autocast(self.totals.device):
                update_bn(itertools.islice(views, 100), self.network)  # 100 batches tell as much as all

    def _check_finite(self, loss: float, epoch: int) -> None:
        """Ends the script with a sentence where the training has diverged."""
        if not math.isfinite(loss) or not all(part.isfinite().all() for part in self.network.parameters()):
            earlier = f" {self.checkpoint_path} is still that of an earlier run." * self.checkpoint_path.exists()
            way_out = f"lower LEARNING_RATE in {SCRIPTS[self.name]}"
            raise SystemExit(f"Training diverged in epoch {epoch + 1}: {way_out}.{earlier}")

    def _save_progress(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"recipe": self.recipe, "curve": self.curve}
        write_atomically(self.progress_path, lambda file: torch.save(state, file))

    def save(self) -> None:
        """Saves the checkpoint and removes the progress."""
        save_checkpoint(self.name, self.network, self.train, self.recipe, self.curve)
        if RANK == 0:
            self.progress_path.unlink(missing_ok=True)
        print(f"Saved {self.checkpoint_path} after {self.curve[-1]['seconds']:.0f} s.", flush=True)
