"""Trains the student to answer as the teacher does: knowledge distillation (Hinton, Vinyals and Dean 2015).

    python train_teacher.py
    python distill.py

A label says which class is right. A teacher's answer also says how much the picture resembles every other class, and
that is what the student learns here in addition. The rest is as in train_student.py: compare the two files. It ends at
89.2 % of CIFAR-10's test images, 0.97 points (0.61 to 1.33) more, after as many steps on the same machine.
"""

import torch.nn.functional as F

import data
import models

SEED = 0  # of the initial weights, the order of the images and their views
EPOCHS = 12  # passes over the training images
BATCH_SIZE = 125  # images per step
LEARNING_RATE = 0.1  # at its peak
WEIGHT_DECAY = 5e-4  # see models.Muon
TEMPERATURE = 4.0  # divides both logits: the higher, the more small probabilities count; 2.0 suits CIFAR-100 better
KD_WEIGHT = 0.9  # weight of the loss's term for the teacher; the labels' term has 1 - KD_WEIGHT
UNLABELLED = False  # True: learn also from images without a label, those that TRAIN_IMAGES leaves or unlabelled/* has


def distillation_loss(student_logits, teacher_logits, labels, temperature, kd_weight):
    """(1 - w) * CE(student, labels) + w * T^2 * KL(teacher || student), the KL between softmax(logits / T).

    student_logits, teacher_logits: [B, classes], of any floating type. labels: int64 [B]. Returns a float32 scalar.
    Both parts are means over all images, in nats, and are computed from log-probabilities, which do not underflow.
    An image without a label (-1) has a cross-entropy of 0: the teacher's answer needs none.
    The gradient of the KL shrinks as 1 / T^2; the factor T^2 keeps the balance of the two at every temperature
    (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2).
    """
    student_logits = student_logits.float()
    teacher_logits = teacher_logits.float()
    hard = F.cross_entropy(student_logits, labels, ignore_index=-1, reduction="sum") / len(labels)
    soft = F.kl_div(  # F.kl_div(input, target) is KL(target || input)
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",  # per image; "mean" would divide by the number of classes as well
        log_target=True,
    )
    return (1 - kd_weight) * hard + kd_weight * temperature**2 * soft


def main():
    device = models.setup()
    models.check_constants(globals())
    train, hold_out = data.load_train(device)
    teacher, _ = models.load_checkpoint("teacher", train.dataset, train)
    if UNLABELLED:
        train = data.add_unlabelled(train)
    student = models.new_network(models.student, train, SEED)
    steps = EPOCHS * data.batch_count(len(train), BATCH_SIZE)
    optimizer = models.Muon(student, LEARNING_RATE, WEIGHT_DECAY, steps)
    schedule = models.make_schedule(optimizer, steps)
    run = models.Run("distilled", student, optimizer, schedule, train, hold_out, globals(), teacher)
    teacher_logits = models.predict(teacher, train, mirror=data.MIRROR)  # one answer per image, not per view
    right = models.accuracy(teacher_logits, train.labels)
    print(f"teacher: {models.parameter_count(teacher):,} parameters, right on {right:.2%} of the training images")

    for epoch in run.epochs():
        for images, labels, positions in data.batches(train, BATCH_SIZE, epoch, SEED):
            with models.autocast(device):
                logits = student(images)
            loss = distillation_loss(logits, teacher_logits[positions], labels, TEMPERATURE, KD_WEIGHT)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            run.update(loss, logits, labels)
    run.save()


if __name__ == "__main__":
    models.run_script(main)
