"""The CUDA path without a GPU: fake tensors know shapes and devices, and raise where a CPU tensor meets a CUDA one."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data
import distill
import models

try:
    from torch._subclasses import FakeTensorMode
except ImportError:
    pytest.skip("this torch has its private FakeTensorMode elsewhere", allow_module_level=True)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU tells more: run the scripts on it")


class Scalars(TorchDispatchMode):
    """Fake tensors have no values: this answers where one is asked for."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 199}.get(arguments[0].dtype, 0.5)
        return function(*arguments, **(options or {}))


def move(module, device, memory_format):
    """Module.to, which swaps tensors in place: fake ones that somebody refers to weakly cannot be swapped."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            part._parameters[name] = None if parameter is None else torch.nn.Parameter(parameter.to(device))
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer.to(device)
    return module


@pytest.fixture(params=["cuda", "meta"])
def device(request, tiny, monkeypatch):
    """Fake tensors take no backward pass on CUDA, but they do on the meta device."""
    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setitem(models.PREDICTION_BATCH, "meta", 2000)
    if request.param == "meta":  # which autocast does not know; without a GPU it switches itself off on CUDA
        monkeypatch.setattr(models, "autocast", lambda device: contextlib.nullcontext())
    device, real = torch.device(request.param), torch.zeros(1)
    with FakeTensorMode(allow_non_fake_inputs=True), Scalars():
        try:
            real.to(device)
        except RuntimeError as error:
            pytest.skip(f"this torch's fake device is not all fake: {str(error).splitlines()[0]}")
        yield device


def test_a_fake_cuda_tensor_does_not_meet_one_on_the_cpu(device):
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=device) + torch.ones(3)


def test_training_and_prediction_stay_on_the_device(device, monkeypatch):
    monkeypatch.setattr(data, "HOLD_OUT", 20)
    train, hold_out = data.load_train(device)
    train = replace(train, images=train.images[:50], labels=train.labels[:50], index=train.index[:50])
    teacher, student = (models.new_network(make, train, 0) for make in (models.teacher, models.student))
    teacher_logits = models.predict(teacher, train, mirror=True)
    optimizer = models.Muon(student, 0.1, 1e-3, 4)
    schedule = models.make_schedule(optimizer, 4)
    monkeypatch.setattr(models, "make_recipe", lambda *arguments: {})  # it counts images, which fake ones are not
    constants = {"SEED": 0, "EPOCHS": 1, "BATCH_SIZE": 25}
    run = models.Run("distilled", student, optimizer, schedule, train, hold_out, constants)
    monkeypatch.setattr(models, "write_atomically", lambda path, write: None)
    for epoch in run.epochs():
        for images, labels, positions in data.batches(train, 25, epoch, 0):
            logits = student(images)
            loss = distill.distillation_loss(logits, teacher_logits[positions], labels, 4.0, 0.9)
            assert loss.device == logits.device and logits.device.type == device.type
            optimizer.zero_grad()
            if device.type == "meta":
                loss.backward()
            else:
                for parameter in student.parameters():
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            schedule.step()
            run.update(loss, logits, labels)
    assert run.curve[0]["hold_out_accuracy"] is not None
    logits = models.predict(student, hold_out)
    assert logits.shape == (20, 10) and F.cross_entropy(logits, hold_out.labels).device.type == device.type


@pytest.fixture
def one_gpu(monkeypatch):
    """What setup() asks of torch.cuda, as on a machine with one GPU."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield chosen
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.parametrize("bfloat16", [True, False])
def test_setup_takes_the_gpu_and_float32_means_float32(bfloat16, one_gpu, monkeypatch):
    monkeypatch.setattr(models, "BFLOAT16", bfloat16)
    assert models.setup() == torch.device("cuda", 0) and one_gpu == [torch.device("cuda", 0)]
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == bfloat16
