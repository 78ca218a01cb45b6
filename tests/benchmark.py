"""Measures where the time goes, on the device that is there, and prints a table.

    DATASET=synthetic python tests/benchmark.py

Not a test: it asserts nothing, and pytest does not collect it. Medians, of things measured in turn where they are
compared. DATASET is as everywhere; a set of 50,000 images takes about ten minutes on two cores.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data
import distill
import evaluate
import models
import train_student
import train_teacher

DEVICE = models.setup()

# Runs a script as `python script.py` does, ends it after 30 steps, and prints the seconds to the first and the memory.
START = """
import time
started = time.time()
import sys
sys.path.insert(0, {root!r})
import atexit, resource, torch, models, {script}
update, steps = models.Run.update, []
def counted(run, *arguments):
    update(run, *arguments)
    steps.append(time.time() - started)
    if len(steps) == 30:
        sys.exit()
def report():
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if sys.platform == "linux":  # where the figure above has the parent's memory in it
        with open("/proc/self/status", encoding="utf-8") as status:
            memory = int(status.read().split("VmHWM:")[1].split()[0]) / 2**20
    print("measured", steps[0] if steps else 0, torch.cuda.max_memory_allocated() / 2**30 or memory)
atexit.register(report)
models.Run.update = counted
{script}.main()
"""


class OneByOne(Dataset):
    """The usual way: one image at a time through torchvision's transforms."""

    def __init__(self, split: data.ImageSet, count: int):
        self.images = [transforms.functional.to_pil_image(image.cpu().numpy()) for image in split.images[:count]]
        self.labels = split.labels[:count].tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(data.SIZE, padding=data.SHIFT, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return self.transform(self.images[number]), self.labels[number]


def seconds(function) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turn(*functions, repeats: int) -> list[list[float]]:
    """The seconds of each function, round by round, after a round that warms up."""
    return [[seconds(function) for function in functions] for _ in range(repeats + 1)][1:]


def medians(*functions, repeats: int) -> list[float]:
    """The median seconds of each function; they run in turn."""
    return [statistics.median(times) for times in zip(*in_turn(*functions, repeats=repeats))]


def row(what: str, value: float, unit: str, remark: str = "") -> None:
    print(f"{what:52}{value:12,.{0 if value >= 100 else 2}f} {unit:10}{remark}", flush=True)


def peak_rate() -> float:
    """The most multiply-accumulates a second that a large product reaches here.

    Of matrices, and of a convolution: on some processors the two come from different libraries, of different speed.
    """
    dtype = models.precision(DEVICE)
    size, count, channels = (8192, 1000, 512) if DEVICE.type == "cuda" else (2048, 125, 256)
    left, right = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    images = torch.randn(count, channels, 16, 16, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    product, convolution = medians(lambda: left @ right, lambda: F.conv2d(images, weight, padding=1), repeats=9)
    return max(size**3 / product, count * 16 * 16 * 9 * channels**2 / convolution)


def batches(train: data.ImageSet, script, limit: int | None = None):
    for number, batch in enumerate(data.batches(train, script.BATCH_SIZE, 0, 0)):
        if number == limit:
            return
        yield batch


def measure_batches(train: data.ImageSet) -> None:
    def ours():
        for _ in batches(train, train_student):
            pass

    def usual(loader):
        for _ in loader:
            pass

    row("views, gathered from one tensor", len(train) / medians(ours, repeats=3)[0], "images/s")
    images = OneByOne(train, 5000)
    for workers in (0, 2):
        loader = DataLoader(images, train_student.BATCH_SIZE, shuffle=True, num_workers=workers)
        taken = medians(lambda loader=loader: usual(loader), repeats=1)[0]
        row(f"DataLoader and transforms, {workers} workers", len(images) / taken, "images/s")


def measure_steps(name: str, make, script, train: data.ImageSet, peak: float, steps: int) -> None:
    """The loop of the scripts beside the bare one: forward, backward and step on one fixed batch of the same shape."""
    network = models.new_network(make, train, 0)
    optimizer = models.Muon(network, 1e-3, 0.0, 10**6)
    schedule = models.make_schedule(optimizer, 10**6)
    run = models.Run(name, network, optimizer, schedule, train, None, vars(script))
    fixed = next(batches(train, script))

    def step(images, labels):
        with models.autocast(DEVICE):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss, logits

    def whole():
        for images, labels, _ in batches(train, script, steps):
            loss, logits = step(images, labels)
            schedule.step()
            run.update(loss, logits, labels)

    def bare():
        for _ in range(steps):
            step(fixed[0], fixed[1])

    network.train()
    rounds = in_turn(whole, bare, repeats=steps // 2)
    in_whole, in_bare = (statistics.median(times) for times in zip(*rounds))
    images = min(steps * script.BATCH_SIZE, len(train))
    macs = 3 * evaluate.multiply_accumulates(network.eval(), fixed[0][:1])  # once forward, twice backward
    row(f"{name}: training, the script's loop", images / in_whole, "images/s")
    share = 100 * macs * images / in_bare / peak
    row(f"{name}: training, the bare loop", images / in_bare, "images/s", f"{share:.0f} % of the machine's")
    own = statistics.median(1 - b / a for a, b in rounds)
    row(f"{name}: the loop's own share of the time", 100 * own, "%")

    network.train()
    if models.precision(DEVICE) == torch.bfloat16:
        precision, models.precision = models.precision, lambda device: torch.float32
        in_float32 = medians(bare, repeats=3)[0]
        models.precision = precision
        row(f"{name}: training, the bare loop, BFLOAT16 = False", images / in_float32, "images/s")
    network.compile()
    try:
        in_compiled = medians(bare, repeats=5)[0]
        row(f"{name}: training, the bare loop, network.compile()", images / in_compiled, "images/s")
    except (RuntimeError, OSError) as error:  # no compiler, mostly
        print(f"{name}: torch.compile does not work here: {str(error).splitlines()[0]}")


def measure_answers(train: data.ImageSet) -> None:
    teacher = models.new_network(models.teacher, train, 0).eval()
    some = replace(train, images=train.images[:5000], labels=train.labels[:5000], index=train.index[:5000])

    @torch.no_grad()
    def plain():
        with models.autocast(DEVICE):
            for images, *_ in data.batches(some, train_student.BATCH_SIZE):
                teacher(images)

    ours, usual = medians(lambda: models.predict(teacher, some), plain, repeats=5)
    row("teacher: prediction", len(some) / ours, "images/s")
    row("teacher: no_grad, training batches", len(some) / usual, "images/s")


def measure_epochs(train: data.ImageSet) -> None:
    """Whole scripts, for one epoch, with an untrained teacher: wrong answers cost what right ones do."""
    teacher = models.new_network(models.teacher, train, 0)
    models.save_checkpoint("teacher", teacher, train, {})
    train_student.EPOCHS = distill.EPOCHS = 1
    measured = []
    models.Run.save = lambda run: measured.append(run.curve[-1]["seconds"])

    def epoch(script):
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            out, sys.stdout = sys.stdout, nowhere
            try:
                script.main()
            finally:
                sys.stdout = out
        return measured[-1]

    load = data.load_train
    data.load_train = lambda device: (train, None)
    passes = seconds(lambda: models.predict(teacher, train, mirror=True))
    epoch(distill)  # to warm up
    pairs = [(epoch(train_student), epoch(distill)) for _ in range(3)]
    alone, taught = (statistics.median(times) for times in zip(*pairs))
    row("epoch of train_student.py", alone, "s")
    row("the teacher's two passes, once for all epochs", passes, "s")
    row("epoch of distill.py, without them", taught, "s")

    quarter = len(train) // 4
    few = replace(train, images=train.images[:quarter], labels=train.labels[:quarter], index=train.index[:quarter])
    data.load_train = lambda device: (few, None)
    part = statistics.median(epoch(train_student) for _ in range(3))
    row(f"epoch of train_student.py, {quarter:,} images", part, "s", f"{alone / part:.2f} times less")
    data.load_train = load


def measure_start() -> None:
    for script in ("train_teacher", "train_student", "distill", "evaluate"):
        taken, memory = [], 0.0
        for _ in range(1 if script == "evaluate" else 3):
            started = subprocess.run(
                [sys.executable, "-c", START.format(script=script, root=str(ROOT))],
                capture_output=True,
                encoding="utf-8",
                check=True,
            )
            first, memory = (float(word) for word in started.stdout.split("measured ")[1].split())
            taken.append(first)
        if any(taken):
            row(f"{script}.py: to the first step", statistics.median(taken), "s")
        row(f"{script}.py: peak memory", memory, "GiB")


def main() -> None:
    processor = platform.processor() or platform.machine()
    if DEVICE.type == "cuda":
        processor = torch.cuda.get_device_name()
    elif hasattr(torch.cpu, "get_capabilities"):
        processor = torch.cpu.get_capabilities().get("cpu_name", processor)
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.system()}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CHECKPOINT_DIR"] = folder
        train, _ = data.load_train(DEVICE)
        print(f"{len(train):,} images of {train.dataset}\n")
        peak = peak_rate()
        row(f"the machine: a large product in {models.precision(DEVICE)}", 2 * peak / 1e9, "GFLOP/s")
        measure_batches(train)
        measure_steps("teacher", models.teacher, train_teacher, train, peak, steps=10)
        measure_steps("student", models.student, train_student, train, peak, steps=30)
        measure_answers(train)
        measure_epochs(train)
        measure_start()


if __name__ == "__main__":
    main()
