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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import models

BINS = 15  # of the expected calibration error
Z = 1.96  # standard errors on each side of a 95 % interval
FEWEST = 10  # images on which two networks must differ before a difference is called significant
ONLY_DISTILLATION = {  # what a student that learns alone does not depend on, and what follows from it
    "TEMPERATURE",
    "KD_WEIGHT",
    "UNLABELLED",
    "TEACHER_WIDTHS",
    "teacher",
    "unlabelled",
    "unlabelled images",
    "steps",
}


def paired_difference(correct, baseline):
    """How much more often `correct` [N] is true than `baseline` [N] on the same images, in points, with its 95 %
    interval, and on how many images they differ: (difference, low, high, differing).

    The interval is that of Agresti and Min 2005 (doi:10.1002/sim.1781): half an image more of each of the four kinds
    makes it hold for few images too.
    """
    gained = (correct & ~baseline).sum().item()
    lost = (baseline & ~correct).sum().item()
    count = len(correct) + 2
    mean = (gained - lost) / count
    variance = (gained + lost + 1) / count - mean**2
    half = Z * math.sqrt(variance / count)
    low = max(-100.0, 100 * (mean - half))
    high = min(100.0, 100 * (mean + half))
    return 100 * (gained - lost) / len(correct), low, high, gained + lost


def calibration_error(logits, labels):
    """Expected calibration error: the mean gap between confidence and accuracy over BINS equal bins of confidence,
    weighted by the images in each (Guo et al. 2017, arXiv:1706.04599). logits [N, classes], labels [N]; 0 to 1."""
    confidence, answer = logits.double().softmax(1).max(1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidence - (answer == labels).double())
    return gaps.abs().sum().item() / len(labels)


def multiply_accumulates(network, image):
    """How many the network's matrix products and convolutions need for one image [1, 3, H, W]. Those of recurrent
    layers, whose kernels are fused, are not counted."""
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention would not be counted
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(image)
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2  # it counts a multiply-accumulate as two


def images_per_second(network, images):
    """Of inference on a batch [B, 3, H, W]: the median of nine passes, after one that warms up."""
    seconds = []
    with torch.inference_mode(), models.autocast(images.device):
        for _ in range(10):
            started = time.perf_counter()
            network(images)[0, 0].item()  # .item() waits for the device
            seconds.append(time.perf_counter() - started)
    return len(images) / statistics.median(seconds[1:])


def measure(name, images, image_hashes):
    """The figures of one network, and its logits [N, classes] on the CPU. image_hashes: data.image_hashes(images)."""
    network, checkpoint = models.load_checkpoint(name, images.dataset, images)
    logits = models.predict(network, images).cpu()
    labels = images.labels.cpu()
    device = images.labels.device
    batch = torch.rand(models.PREDICTION_BATCH[device.type], 3, data.SIZE, data.SIZE, device=device)
    batch = batch.to(memory_format=torch.channels_last)
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


def doubts(figures):
    """Sentences that name whatever the two students' trainings differ in but distillation itself, and networks that
    were trained by other code, or by another teacher, than lies here now.
    """
    sentences = []
    recipe = figures["student"]["recipe"]
    distilled_recipe = figures["distilled"]["recipe"]
    left_out = ONLY_DISTILLATION | {name for name in recipe | distilled_recipe if ".py" in name}
    if "unlabelled" in distilled_recipe:
        unlabelled = distilled_recipe["unlabelled images"]
        seen = f"distilled.pt has learned from {unlabelled:,} more images, without labels"
        steps = f"in {distilled_recipe['steps']:,} steps; student.pt had {recipe.get('steps', 0):,} steps"
        sentences.append(f"{seen}, {steps}.")
        left_out |= {name for name in recipe if name.startswith(("EPOCHS", "lr of group"))}  # the steps tell
    differing = models.differences(recipe, distilled_recipe, left_out)
    if differing:
        sentences.append(f"Not a fair comparison: student and distilled were trained with different {differing}.")
    for file in recipe:
        if ".py" in file and recipe[file] != distilled_recipe.get(file, recipe[file]):
            sentences.append(f"Perhaps not a fair comparison: {file} was edited between the two trainings.")
    for name, row in figures.items():
        script = models.SCRIPTS[name]
        then = row["recipe"].get(script)
        if then and then != models.code_hash(models.ROOT / script, row["recipe"]):
            sentences.append(f"{name}.pt was trained by another {script} than this one.")
    if "teacher" in figures and distilled_recipe.get("teacher") != figures["teacher"]["fingerprint"]:
        sentences.append("distilled.pt was distilled from another teacher than teacher.pt: run python distill.py.")
    return sentences


def compare(figures, logits, labels):
    """What the figures show together, as results.json has it, and the sentences that say it.

    Adds to the figures of each network its agreement with the teacher.
    """
    results = {"distilled_minus_student": None, "gap_closed": None}
    correct = {}
    for name, row in figures.items():
        correct[name] = logits[name].argmax(1) == labels
        if "teacher" in logits:
            row["agreement_with_teacher"] = models.accuracy(logits[name], logits["teacher"].argmax(1))
    if not {"student", "distilled"} <= figures.keys():
        return results, []
    points, low, high, differing = paired_difference(correct["distilled"], correct["student"])
    results["distilled_minus_student"] = {"points": points, "ci95": [low, high]}
    sentences = [f"distilled - student: {points:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}."]
    if differing < FEWEST:
        sentences.append("Not significant: fewer than ten images differ.")
    elif low <= 0 <= high:
        sentences.append("Not significant: the interval includes 0.")
    elif points < 0:
        sentences.append("The distilled student is significantly worse.")
    elif "teacher" in correct:
        gap, low, _, differing = paired_difference(correct["teacher"], correct["student"])
        if low > 0 and differing >= FEWEST:
            results["gap_closed"] = points / gap
            sentences.append(f"Distillation closed {points / gap:.0%} of the gap of {gap:.2f} points to the teacher.")
    return results, sentences + doubts(figures)


def show(results, sentences):
    """Prints the figures of all networks and the sentences of `compare`."""
    print(f"\n{results['test_images']:,} test images of {results['dataset']}, on {results['device']}\n")
    print("            accuracy %    loss  ECE %  agreement %     parameters           MACs   images/s")
    for name, row in results["models"].items():
        agreement = "-"
        if row["agreement_with_teacher"] is not None:
            agreement = f"{100 * row['agreement_with_teacher']:.2f}"
        figures = f"{100 * row['accuracy']:12.2f}{row['loss']:8.4f}{100 * row['ece']:7.2f}{agreement:>13}"
        print(f"{name:10}{figures}{row['parameters']:15,}{row['macs']:15,}{row['images_per_second']:11,.0f}")
    print("", *sentences, sep="\n")


def main():
    device = models.setup()
    test = data.load_test(device)
    folder = models.checkpoint_dir(test.dataset)
    image_hashes = data.image_hashes(test.images)
    figures = {}
    logits = {}
    for name, script in models.SCRIPTS.items():
        if (folder / f"{name}.pt").exists():
            figures[name], logits[name] = measure(name, test, image_hashes)
        else:
            print(f"No {name} checkpoint: run python {script}.")
    if not figures:
        raise SystemExit(f"There is nothing to evaluate in {folder}.")
    comparison, sentences = compare(figures, logits, test.labels.cpu())
    known = max(row["test_images_trained_on"] for row in figures.values())
    if known:
        sentences.append(f"{known} of the test images are also among the training images.")
    results = {
        "dataset": test.dataset,
        "device": device.type,
        "torch": torch.__version__,
        "test_images": len(test),
        "models": figures,
        **comparison,
    }
    show(results, sentences)
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    models.write_atomically(folder / "results.json", lambda file: file.write(text.encode()))
    print(f"Written to {folder / 'results.json'}.")


if __name__ == "__main__":
    models.run_script(main)
