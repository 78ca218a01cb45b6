"""Repeats the four scripts over seeds and prints means, standard deviations and paired differences.

    DATASET=synthetic python tests/seeds.py

Teacher, student and distilled student all use the same seed; the two students start from the same weights and see the
same batches. Each seed has a folder of checkpoints of its own, CHECKPOINT_DIR/seed-<s>; a network that is there is not
trained again, so that an interrupted series goes on where it was. Networks of other constants, or of other code in
their own script, are not used: the series names their files, and ends. All figures are made from the networks that lie
there now, and written to <dataset>.json beside the seeds' folders.

With HOLD_OUT in data.py above 0 the figures are those of the hold-out, and no test image is read: to choose constants.
The difference is also pooled over the seeds, with an interval over the images, which holds for these networks only.

To compare two ways to distil, run the series, copy the teachers into another CHECKPOINT_DIR (seed-<s>/<dataset>/
teacher.pt), edit distill.py, and run the series there with AGAINST = the first CHECKPOINT_DIR: its distilled students
take the place of the students from the labels.
"""

import json
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import distill
import evaluate
import models
import train_student
import train_teacher

SEEDS = range(5)
AGAINST = None  # a CHECKPOINT_DIR with the same seeds and teachers, whose distilled students are compared with
TRAININGS = {"teacher": train_teacher, "student": train_student, "distilled": distill}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's t, by the count
COLUMNS = (("accuracy", 100, 2, 18), ("loss", 1, 4, 20), ("ece", 100, 2, 16), ("agreement_with_teacher", 100, 2, 18))
EDITABLE = {"SEED", "TEACHER_WIDTHS", "STUDENT_WIDTHS", "data.py", "models.py"}  # a recipe's, see check_recipes


def use_seed(root: Path, seed: int) -> Path:
    """Lets all scripts use the checkpoints of one seed. Returns their folder."""
    os.environ["CHECKPOINT_DIR"] = str(root / f"seed-{seed}")
    return models.checkpoint_dir(data.dataset_name())


def recipe_of(name: str, path: Path) -> dict:
    """What the checkpoint of that name at that path says it was trained by; ends the series where it cannot be used."""
    return models.load_checkpoint(name, path.parent.name)[1]["recipe"]


def check_recipes(root: Path, device: torch.device) -> None:
    """Ends the series if it has networks of other constants, scripts or images than now, before hours are lost.

    The widths and models.py are compared by what they make: load_checkpoint refuses another network than was saved.
    """
    others = []
    edited = set()
    images = set()
    for name, script in TRAININGS.items():
        models.check_constants(vars(script))
        now = models.recipe_of_files(vars(data), vars(models), vars(script))
        now["precision"] = str(models.precision(device))
        for seed in SEEDS:
            path = use_seed(root, seed) / f"{name}.pt"
            if not path.is_file():
                continue
            recipe = recipe_of(name, path)
            images.add(recipe["images"])
            if "models.py" not in recipe:  # a network from elsewhere
                continue
            differing = {key for key in now if recipe.get(key) != now[key]}
            edited |= differing & {"data.py", "models.py"}
            if differing - EDITABLE:
                others.append(str(path))
    if others:
        wanted = "Delete them, and the distilled.pt of each teacher.pt among them, or name another CHECKPOINT_DIR"
        raise SystemExit(f"Trained with other constants than now, or by another script: {', '.join(others)}. {wanted}.")
    if images and images != {data.load_train("cpu")[0].fingerprint}:
        raise SystemExit(f"Some networks in {root} were trained on other images than there are now.")
    for file in sorted(edited):
        print(f"{file} was edited since some of these networks were trained.")


def check_against(root: Path, against: Path) -> None:
    """Ends the series where AGAINST lacks a distilled student, or has one of another teacher than is here."""
    for seed in SEEDS:
        path = use_seed(against, seed) / "distilled.pt"
        if not path.is_file():
            raise SystemExit(f"There is no {path} (AGAINST in tests/seeds.py): run the series there first.")
        taught_by = recipe_of("distilled", path).get("teacher")
        path = use_seed(root, seed) / "teacher.pt"
        if not path.is_file():
            raise SystemExit(f"There is no {path}: copy the teachers of AGAINST first.")
        teacher, _ = models.load_checkpoint("teacher", path.parent.name)
        if taught_by != data.fingerprint(*teacher.state_dict().values()):
            raise SystemExit(f"{path} is another teacher than that of the distilled student in {against}.")


def train_what_is_missing(root: Path, against: Path | None) -> None:
    for seed in SEEDS:
        folder = use_seed(root, seed)
        for name, script in TRAININGS.items():
            replaced = against and name == "student"
            if not replaced and not (folder / f"{name}.pt").is_file():
                script.SEED = seed
                script.main()


def figures_of(seed: int, root: Path, against: Path | None, images: data.ImageSet, image_hashes) -> tuple[dict, dict]:
    """The figures and the logits of one seed's three networks, by name. image_hashes: data.image_hashes(images)."""
    figures = {}
    logits = {}
    for name in TRAININGS:
        replaced = against and name == "student"
        use_seed(against if replaced else root, seed)
        figures[name], logits[name] = evaluate.measure("distilled" if replaced else name, images, image_hashes)
    evaluate.compare(figures, logits, images.labels.cpu())  # adds the agreement with the teacher
    return figures, logits


def by_image(logits: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """What distillation gains on each image: whether it is right, in points, and its loss, float64 [2, N]."""
    figures = {}
    for name in ("student", "distilled"):
        right = 100.0 * (logits[name].argmax(1) == labels)
        losses = F.cross_entropy(logits[name], labels, reduction="none")
        figures[name] = torch.stack([right, losses]).double()
    return figures["distilled"] - figures["student"]


def interval(mean: float, half: float, digits: int) -> str:
    return f"{mean:+.{digits}f} ({mean - half:+.{digits}f} to {mean + half:+.{digits}f})"


def main() -> None:
    if len(SEEDS) not in T_95:
        raise SystemExit(f"SEEDS in tests/seeds.py must be from {min(T_95)} to {max(T_95)} seeds, not {len(SEEDS)}.")
    if data.WORLD_SIZE > 1:
        raise SystemExit("tests/seeds.py runs as one process: start it with python, not with torchrun.")
    device = models.setup()
    root = models.checkpoint_dir("")
    against = data.path_from("AGAINST", AGAINST) if AGAINST else None
    check_recipes(root, device)
    if against:
        check_against(root, against)
    train_what_is_missing(root, against)
    images = data.load_train(device)[1] if data.HOLD_OUT else data.load_test(device)
    labels = images.labels.cpu()
    image_hashes = data.image_hashes(images.images)
    split = "hold-out" if data.HOLD_OUT else "test"
    runs = []
    gains_by_image = []
    for seed in SEEDS:
        figures, logits = figures_of(seed, root, against, images, image_hashes)
        runs.append(figures)
        gains_by_image.append(by_image(logits, labels))
    written = {
        "dataset": images.dataset,
        "split": split,
        "torch": torch.__version__,
        "seeds": list(SEEDS),
        "images": len(images),
        "against": str(against) if against else None,
        "models": {},
        "distilled_minus_student": {},
    }
    print(f"\n{images.dataset}, {len(images):,} {split} images, {len(runs)} seeds, torch {torch.__version__}\n")
    print(f"{'':12}{'accuracy %':>18}{'loss':>20}{'ECE %':>16}{'agreement %':>18}")
    for name in TRAININGS:
        line = f"{name:12}"
        written["models"][name] = {}
        for key, scale, digits, width in COLUMNS:
            values = [figures[name][key] for figures in runs]
            written["models"][name][key] = values
            scaled = [scale * value for value in values]
            shown = f"{statistics.mean(scaled):.{digits}f} +- {statistics.stdev(scaled):.{digits}f}"
            line += f"{shown:>{width}}"
        print(line)
    if against:
        print(f"student: the distilled one in {against}")
    print(f"\ndistilled - student, paired by seed; 95 % intervals by Student's t over {len(runs)} seeds")
    for key, scale, digits, _ in COLUMNS:
        gains = [scale * (figures["distilled"][key] - figures["student"][key]) for figures in runs]
        mean = statistics.mean(gains)
        half = T_95[len(gains)] * statistics.stdev(gains) / len(gains) ** 0.5
        single = ", ".join(f"{gain:+.{digits}f}" for gain in gains)
        print(f"{key:24}{interval(mean, half, digits)}: {single}")
        in_printed_units = {"mean": mean, "ci95": [mean - half, mean + half], "by_seed": gains}
        written["distilled_minus_student"][key] = in_printed_units
    accuracy = {name: statistics.mean(row["accuracy"]) for name, row in written["models"].items()}
    gap = accuracy["teacher"] - accuracy["student"]
    closed = (accuracy["distilled"] - accuracy["student"]) / gap if gap > 0 else None
    written |= {"gap": 100 * gap, "gap_closed": closed}
    share = "" if closed is None else f", of which {closed:.1%} is closed"
    print(f"{'gap to the teacher':24}{100 * gap:.2f} points{share}")
    pooled = torch.stack(gains_by_image).mean(0)
    print(f"pooled over the seeds; 95 % intervals over {len(images):,} images, for these networks")
    for name, digits, gains in zip(("accuracy", "loss"), (2, 4), pooled):
        mean = gains.mean().item()
        half = evaluate.Z * gains.std().item() / len(gains) ** 0.5
        print(f"pooled {name:17}{interval(mean, half, digits)}")
        written["distilled_minus_student"][f"pooled {name}"] = {"mean": mean, "ci95": [mean - half, mean + half]}
    path = root / f"{images.dataset}.json"
    text = json.dumps(written, indent=2) + "\n"
    models.write_atomically(path, lambda file: file.write(text.encode()))
    print(f"Written to {path}.")


if __name__ == "__main__":
    models.run_script(main)
