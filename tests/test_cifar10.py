"""DATASET=cifar10, download and MD5 check included, against a small archive in the real format on localhost."""

import functools
import hashlib
import http.server
import io
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

import data

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def md5(content):
    return hashlib.md5(content).hexdigest()


def batch(seed, count=20):
    """A file of the archive, and what is in it."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, count).tolist()
    return pickle.dumps({"data": images.reshape(count, 3072), "labels": labels}), images, labels


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a small archive in the real format; torchvision is told its address and checksums, nothing else."""
    files, train_images, train_labels = {}, [], []
    for number in range(1, 6):
        files[f"data_batch_{number}"], images, labels = batch(number)
        train_images.append(images)
        train_labels += labels
    files["test_batch"], test_images, test_labels = batch(6)
    files["batches.meta"] = pickle.dumps({"label_names": CLASSES})
    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setattr(CIFAR10, "url", url)
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5((served / "cifar-10-python.tar.gz").read_bytes()))
        monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(files[name])] for name in list(files)[:5]])
        monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(files["test_batch"])]])
        meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(files["batches.meta"])}
        monkeypatch.setattr(CIFAR10, "meta", meta)
        monkeypatch.setenv("DATASET", "cifar10")
        monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
        running.requests, running.archive = requests, served / "cifar-10-python.tar.gz"
        running.train, running.test = (np.concatenate(train_images), train_labels), (test_images, test_labels)
        yield running
        running.shutdown()


def test_cifar10_is_downloaded_once_and_read_as_it_is(server):
    train, _ = data.load_train("cpu")
    requests = len(server.requests)  # torchvision asks twice: for redirections, then for the file
    test = data.load_test("cpu")
    assert requests > 0 and len(server.requests) == requests
    assert train.dataset == "cifar10" and train.classes == tuple(CLASSES)
    assert torch.equal(train.images.permute(0, 3, 1, 2), torch.from_numpy(server.train[0]))
    assert train.labels.tolist() == server.train[1]
    assert torch.equal(test.images.permute(0, 3, 1, 2), torch.from_numpy(server.test[0]))
    assert test.labels.tolist() == server.test[1]


def test_a_corrupt_download_is_refused(server, monkeypatch):
    monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
    with pytest.raises(SystemExit, match="(?s)No CIFAR10 in .*cifar-10-python.tar.gz.*DATASET=synthetic"):
        data.load_train("cpu")


def test_a_damaged_file_is_downloaded_again(server, tmp_path):
    data.load_train("cpu")
    requests = len(server.requests)
    for name in ("cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_2"):
        path = tmp_path / "data" / name
        path.write_bytes(path.read_bytes()[:-10])
    train, _ = data.load_train("cpu")
    assert len(server.requests) == 2 * requests and train.labels.tolist() == server.train[1]


def test_an_archive_put_there_by_hand_needs_no_network(server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(server.archive.read_bytes())
    train, _ = data.load_train("cpu")
    assert not server.requests and train.labels.tolist() == server.train[1]


def test_no_network_and_no_archive_is_one_sentence(server, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
    with pytest.raises(SystemExit, match="(?s)No CIFAR10 in .*no download.*DATASET=synthetic"):
        data.load_train("cpu")


def test_an_error_page_is_refused(server):
    server.archive.unlink()
    with pytest.raises(SystemExit, match="no download.*404"):
        data.load_train("cpu")


def test_an_error_page_that_says_it_is_fine_is_refused_and_replaced_later(server, monkeypatch):
    whole = server.archive.read_bytes()
    server.archive.write_bytes(b"<html>Please log in to this network.</html>")
    with pytest.raises(SystemExit, match="no download.*corrupt"):
        data.load_train("cpu")
    server.archive.write_bytes(whole)
    assert data.load_train("cpu")[0].labels.tolist() == server.train[1]


def test_a_half_extracted_archive_is_extracted_again_without_the_network(server, tmp_path):
    data.load_train("cpu")
    requests = len(server.requests)
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_4").unlink()
    (tmp_path / "data" / "cifar-10-batches-py" / "test_batch").write_bytes(b"half")
    assert data.load_train("cpu")[0].labels.tolist() == server.train[1]
    assert data.load_test("cpu").labels.tolist() == server.test[1] and len(server.requests) == requests


def test_a_truncated_archive_and_no_network_is_one_sentence(server, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(server.archive.read_bytes()[:-100])
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(SystemExit, match="put an undamaged cifar-10-python.tar.gz there"):
        data.load_train("cpu")


def test_cifar100_is_read_as_it_is(tmp_path, monkeypatch):
    folder, names = tmp_path / CIFAR100.base_folder, [f"class {number}" for number in range(100)]
    folder.mkdir()
    written = {"meta": {"fine_label_names": names}}
    for number, split in enumerate(("train", "test")):
        pixels = np.random.default_rng(number).integers(0, 256, (200, 3072), dtype=np.uint8)
        written[split] = {"data": pixels, "fine_labels": [*range(100), *range(100)], "coarse_labels": [0] * 200}
    for name, content in written.items():
        (folder / name).write_bytes(pickle.dumps(content))
        checked = md5((folder / name).read_bytes())
        if name == "meta":
            monkeypatch.setattr(CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": checked})
        else:
            monkeypatch.setattr(CIFAR100, f"{name}_list", [[name, checked]])
    monkeypatch.setenv("DATASET", "cifar100")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    for loaded, split in ((data.load_train("cpu")[0], "train"), (data.load_test("cpu"), "test")):
        assert loaded.dataset == "cifar100" and loaded.classes == tuple(names)
        assert np.array_equal(loaded.images.permute(0, 3, 1, 2).flatten(1).numpy(), written[split]["data"])
        assert loaded.labels.tolist() == written[split]["fine_labels"]
