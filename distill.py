"""Trains the student to answer as the teacher does: knowledge distillation (Hinton, Vinyals and Dean 2015).

    python train_teacher.py
    python distill.py

A label says which class is right. A teacher's answer also says how much the picture resembles every other class, and
that is what the student learns here in addition. The rest is as in train_student.py: compare the two files.
"""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

import data
import models
from data import ImageSet

SEED = 0  # of the initial weights and the order of the images
EPOCHS = 20  # passes over the training images
BATCH_SIZE = 125  # images per step
LEARNING_RATE = 0.2  # at its peak
WEIGHT_DECAY = 5e-4  # on the weights that SGD moves; see models.Muon
TEMPERATURE = 4.0  # divides the logits of both: the higher, the more the small probabilities count
KD_WEIGHT = 0.9  # share of the loss that comes from the teacher; the labels have the rest
KEEP_ANSWERS = True  # keep the teacher's answers beside the checkpoints, for the next run with another constant


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, kd_weight: float
) -> Tensor:
    """(1 - w) * CE(student, labels) + w * T^2 * KL(teacher || student), the latter of distributions softened by T.

    student_logits, teacher_logits: [B, classes], of any floating type. labels: int64 [B]. Returns a float32 scalar.
    Both parts are means over the images, in nats, and are computed from log-probabilities, which do not underflow.
    The gradient of the KL shrinks as 1 / T^2; the factor T^2 keeps the balance of the two at every temperature
    (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2).
    """
    student_logits, teacher_logits = student_logits.float(), teacher_logits.float()
    hard = F.cross_entropy(student_logits, labels)
    soft = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",  # per image; "mean" would divide by the number of classes as well
        log_target=True,
    )
    return (1 - kd_weight) * hard + kd_weight * temperature**2 * soft


def teacher_answers(teacher: nn.Module, train: ImageSet, epoch: int, folder: Path) -> Tensor:
    """The teacher's logits for this epoch's view of each training image: float16 [N, classes], in the images' order.

    The views follow from the epoch alone, so the answers are computed once, kept in the folder, and read there by every
    later run. The folder's name stands for the teacher, the images and their views, the device and its precision.
    """
    path = folder / f"epoch-{epoch:04}.pt"
    kept = models.read(path) if KEEP_ANSWERS else None
    if kept is not None:
        if kept.get("answers_to") == [folder.name, epoch]:
            return kept["logits"].to(train.labels.device)
        print(f"{path} is damaged or foreign: the teacher answers anew.")
    logits = models.predict(teacher, train, epoch).half()
    if KEEP_ANSWERS:
        models.save(path, {"answers_to": [folder.name, epoch], "logits": logits.cpu()})
    return logits


def main() -> None:
    recipe = models.make_recipe(
        __file__,
        SEED=SEED,
        EPOCHS=EPOCHS,
        BATCH_SIZE=BATCH_SIZE,
        LEARNING_RATE=LEARNING_RATE,
        WEIGHT_DECAY=WEIGHT_DECAY,
        TEMPERATURE=TEMPERATURE,
        KD_WEIGHT=KD_WEIGHT,
    )
    data.check("distill.py", "KEEP_ANSWERS", KEEP_ANSWERS, bool)
    device = models.best_device()
    train, hold_out = data.load_train(device)

    teacher, _ = models.load_checkpoint("teacher", train.dataset, train.classes, device)
    teacher.requires_grad_(False)
    recipe["teacher"] = models.fingerprint(teacher)
    key = models.fingerprint(teacher, train.images, train.index, *data.draw_views(0, 1000))
    folder = models.checkpoint_folder(train.dataset) / "answers" / f"{key}-{device.type}-{models.precision(device)}"
    answers = models.predict(teacher, hold_out) if hold_out else teacher_answers(teacher, train, 0, folder)
    share = models.accuracy(answers, (hold_out or train).labels)
    print(f"The teacher is right on {100 * share:.2f} % of the {'hold-out' if hold_out else 'training'} images.")

    student = models.new_network("student", train, SEED)
    steps = EPOCHS * data.batch_count(len(train), BATCH_SIZE)
    optimizer, schedule = models.make_optimizer(student, LEARNING_RATE, WEIGHT_DECAY, steps)
    run = models.Run("distilled", student, optimizer, schedule, recipe, train, hold_out)

    for epoch in run.epochs():
        teacher_logits = teacher_answers(teacher, train, epoch, folder)  # to the views that this epoch shows
        for images, labels, positions in run.watch(data.batches(train, BATCH_SIZE, epoch, SEED)):
            with models.autocast(device):
                logits = student(images)
            loss = distillation_loss(logits, teacher_logits[positions], labels, TEMPERATURE, KD_WEIGHT)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            run.record(loss, logits, labels)
    run.save()
    if KEEP_ANSWERS:
        size = sum(file.stat().st_size for file in folder.glob("epoch-*.pt"))
        print(f"The teacher's answers are kept for the next run: {size / 1e6:.1f} MB in {folder}.")


if __name__ == "__main__":
    main()
