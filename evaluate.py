"""Compares teacher, student and distilled student on the test images, which no training script reads.

    python evaluate.py

Prints a table and writes results.json beside the checkpoints. tests/draw.py draws pictures of it.
"""

import json
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import models
from data import ImageSet

BINS = 15  # of the expected calibration error
Z = 1.96  # standard errors on each side of a 95 % interval


def paired_difference(correct: Tensor, correct_before: Tensor) -> tuple[float, float, float, float]:
    """How much more often `correct` [N] is true than `correct_before` [N] on the same images, in points, with its 95 %
    interval, and the probability of a difference as large by chance: (difference, low, high, p).

    The interval is that of Agresti and Min 2005 (doi:10.1002/sim.1781): half an image more of each of the four kinds
    makes it hold for few images too. p: by the exact test of McNemar 1947, on the images on which they differ.
    """
    gained, lost = (correct & ~correct_before).sum().item(), (correct_before & ~correct).sum().item()
    differing, count = gained + lost, len(correct)
    mean = (gained - lost) / (count + 2)
    half = Z * math.sqrt(((differing + 1) / (count + 2) - mean**2) / (count + 2))
    coin = torch.distributions.Binomial(*torch.tensor([differing, 0.5], dtype=torch.float64))
    p = min(1.0, 2 * coin.log_prob(torch.arange(min(gained, lost) + 1, dtype=torch.float64)).exp().sum().item())
    return 100 * (gained - lost) / count, max(-100.0, 100 * (mean - half)), min(100.0, 100 * (mean + half)), p


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over BINS equal bins of confidence,
    weighted by the images in each (Guo et al. 2017, arXiv:1706.04599). logits [N, classes], labels [N]; 0 to 1."""
    confidence, answer = logits.double().softmax(1).max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidence - (answer == labels).double())
    return gaps.abs().sum().item() / len(labels)


def multiply_accumulates(network: nn.Module, image: Tensor) -> int | None:
    """How many the network's matrix products and convolutions need for one image [1, 3, H, W]; None with recurrent
    layers, whose fused kernels are not counted."""
    if any(isinstance(module, nn.RNNBase) for module in network.modules()):
        return None
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nor are those of transformers, so they are switched off
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(image)
    torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2  # it counts a multiply-accumulate as two


def images_per_second(network: nn.Module, images: Tensor) -> float:
    """Of inference on a batch [B, 3, H, W]: the median of nine passes, after one that warms up."""
    seconds = []
    with torch.inference_mode(), models.autocast(images.device):
        for _ in range(10):
            started = time.perf_counter()
            network(images)[0, 0].item()  # .item() waits for the device
            seconds.append(time.perf_counter() - started)
    return len(images) / statistics.median(seconds[1:])


def measure(name: str, test: ImageSet, image_hashes: Tensor) -> tuple[dict, Tensor]:
    """The figures of one network, and its logits [N, classes] on the CPU. image_hashes: data.image_hashes(images)."""
    network, checkpoint = models.load_checkpoint(name, test.dataset, test)
    logits, labels = models.predict(name, network, test).cpu(), test.labels.cpu()
    batch = torch.rand(models.PREDICTION_BATCH[test.labels.device.type], 3, data.SIZE, data.SIZE)
    batch = batch.to(test.labels.device, memory_format=torch.channels_last)
    figures = {
        "accuracy": models.accuracy(logits, labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "ece": calibration_error(logits, labels),
        "agreement_with_teacher": None,
        "parameters": models.parameter_count(network),
        "macs": multiply_accumulates(network, batch[:1]),
        "images_per_second": images_per_second(network, batch),
        "fingerprint": data.fingerprint(*network.state_dict().values()),
        "recipe": checkpoint["recipe"],
        "curve": checkpoint["curve"],
        "test_images_trained_on": torch.isin(image_hashes, checkpoint["image_hashes"]).sum().item(),
    }
    return figures, logits


def compare(figures: dict[str, dict], logits: dict[str, Tensor], labels: Tensor) -> tuple[dict, list[str]]:
    """What the figures show together, as results.json has it, and the sentences that say it.

    Adds to the figures of each network its agreement with the teacher.
    """
    results, sentences = {"distilled_minus_student": None, "gap_closed": None}, []
    correct = {name: answers.argmax(1) == labels for name, answers in logits.items()}
    if "teacher" in logits:
        for name, row in figures.items():
            row["agreement_with_teacher"] = models.accuracy(logits[name], logits["teacher"].argmax(1))
    if not {"student", "distilled"} <= figures.keys():
        return results, sentences
    points, low, high, p = paired_difference(correct["distilled"], correct["student"])
    results["distilled_minus_student"] = {"points": points, "ci95": [low, high], "p": p}
    sentences.append(f"distilled - student: {points:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}.")
    if p >= 0.05:
        sentences.append(f"Not significant: p = {p:.2f} (exact McNemar test).")
    elif points < 0:
        sentences.append("The distilled student is significantly worse.")
    elif "teacher" in correct:
        gap, *_, p = paired_difference(correct["teacher"], correct["student"])
        if p < 0.05 and gap > 0:
            results["gap_closed"] = points / gap
            sentences.append(f"Distillation closed {points / gap:.0%} of the gap of {gap:.2f} points to the teacher.")
    recipe, distilled_recipe = (figures[name]["recipe"] for name in ("student", "distilled"))
    constants = {name: value for name, value in recipe.items() if not name.endswith(".py")}  # not the hashes of code
    if differing := models.differences(constants, {name: distilled_recipe.get(name) for name in constants}):
        sentences.append(f"Not a fair comparison: student and distilled were trained with different {differing}.")
    for file in ("models.py", "data.py"):
        if recipe.get(file) != distilled_recipe.get(file):
            sentences.append(f"Perhaps not a fair comparison: {file} was edited between the two trainings.")
    for name, script in models.SCRIPTS.items():
        hashes = figures[name]["recipe"] if name in figures else {}
        if script in hashes and hashes[script] != models.code_hash(script, hashes):
            sentences.append(f"{name}.pt was trained by another {script} than this one.")
    if "teacher" in figures and distilled_recipe.get("teacher") != figures["teacher"]["fingerprint"]:
        sentences.append("distilled.pt was distilled from another teacher than teacher.pt: run python distill.py.")
    return results, sentences


def main() -> None:
    device = models.setup()
    test = data.load_test(device)
    labels, folder, figures, logits = test.labels.cpu(), models.checkpoint_dir(test.dataset), {}, {}
    image_hashes = data.image_hashes(test.images)
    for name, script in models.SCRIPTS.items():
        if (folder / f"{name}.pt").exists():
            figures[name], logits[name] = measure(name, test, image_hashes)
        else:
            print(f"No {name} checkpoint: run python {script}.")
    if not figures:
        raise SystemExit(f"There is nothing to evaluate in {folder}.")
    comparison, sentences = compare(figures, logits, labels)
    results = {"dataset": test.dataset, "split": "hold-out" if test.fingerprint else "test", "test_images": len(test)}
    results |= {"device": device.type, "torch": torch.__version__, "models": figures} | comparison
    if known := max(part["test_images_trained_on"] for part in figures.values()):
        sentences.append(f"{known} of the {results['split']} images are also among the training images.")
    show(results, sentences)
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    models.write_atomically(folder / "results.json", lambda file: file.write(text.encode()))
    print(f"Written to {folder / 'results.json'}.")


def show(results: dict, sentences: list[str]) -> None:
    """Prints the figures of all networks and the sentences of `compare`."""
    print(f"\n{results['test_images']:,} {results['split']} images of {results['dataset']}, on {results['device']}\n")
    row = "{:10}{:>12}{:>8}{:>7}{:>13}{:>15}{:>15}{:>11}".format
    print(row("", "accuracy %", "loss", "ECE %", "agreement %", "parameters", "MACs", "images/s"))
    for name, part in results["models"].items():
        share = f"{100 * part['accuracy']:.2f}"
        agreement = part["agreement_with_teacher"]
        agreement = "-" if agreement is None else f"{100 * agreement:.2f}"
        cost = (f"{part[key]:,.0f}" if part[key] else "-" for key in ("parameters", "macs", "images_per_second"))
        print(row(name, share, f"{part['loss']:.4f}", f"{100 * part['ece']:.2f}", agreement, *cost))
    print("", *sentences, sep="\n")


if __name__ == "__main__":
    models.run_script(main)
