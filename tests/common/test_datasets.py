"""Data sets: embedded ones, the plain npz form, official archives, folder trees. Needs no data and no network."""

import hashlib
import pickle
import random
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision import datasets as official_sets
from torchvision import transforms

from common import datasets
from common.datasets import cluttered_digits, digits, imagenet, images, official
from common.datasets.__main__ import main
from common.datasets.images import Published, fingerprint, save_npz
from common.errors import UserError


# ------------------------------------------------------------------------------------------------ embedded sets
def test_digits_split_is_fixed_balanced_and_disjoint():
    train, test = datasets.load("digits", "train"), datasets.load("digits", "test")
    assert (len(train), len(test), train.classes) == (1397, 400, 10)
    assert train.images.shape == (1397, 8, 8, 1)
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    assert test.labels.bincount().tolist() == [40] * 10
    assert train.labels.bincount().min() >= 130
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    handwriting = {image.numpy().tobytes() for image in train.images}
    assert not handwriting & {image.numpy().tobytes() for image in test.images}
    assert train.digest == "36dac8d594d1a5f7de937c2327ea638e729035c17223e1d062e05506aa2f4ad2"
    assert test.digest == "14632081d077999fbb7d81107a133055ca416a33facf82f11c6eb652aaf553b4"
    _, mean, std = images.statistics(train.images.numpy(), train.labels.numpy())
    assert train.mean == pytest.approx(mean, abs=1e-4)
    assert train.std == pytest.approx(std, abs=1e-4)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    source = load_digits()
    both = [digits.load(split) for split in ("train", "test")]
    pixels = torch.cat([part.images for part in both])[..., 0].numpy()
    labels = torch.cat([part.labels for part in both]).numpy()
    found = sorted((np.round(p / 255 * 16).astype(int).tolist(), int(y)) for p, y in zip(pixels, labels, strict=True))
    expected = sorted((p.astype(int).tolist(), int(y)) for p, y in zip(source.images, source.target, strict=True))
    assert found == expected


@pytest.mark.parametrize(
    ("size", "digest"),
    [
        (16, "07287a8d95829b5f4fc0a4742d4c89bdc120022acb50f78f80117f9f63c5d7e3"),
        (24, "c4ee92117659f3279bf96788a9974befaceb2485fdb2fa57621c44820f7fe91e"),
        (32, "4da8482d6d19770792627dc6b0fa0de004d0e77a7288eff590fccc376fb4fe0e"),
    ],
)
def test_cluttered_digits_are_golden(size, digest):
    made = datasets.load("cluttered_digits", "train", n=64, size=size)
    assert made.images.shape == (64, size, size, 3)
    assert made.digest == digest


def test_cluttered_digits_are_a_pure_function_of_their_arguments():
    state = torch.get_rng_state()
    first = cluttered_digits.load("train", n=600, size=16)
    again = cluttered_digits.load("train", n=600, size=16)
    assert torch.equal(first.images, again.images)
    assert torch.equal(torch.get_rng_state(), state)
    prefix = cluttered_digits.load("train", n=300, size=16)
    assert torch.equal(prefix.images, first.images[:300])
    assert torch.equal(prefix.labels, first.labels[:300])
    for other in (cluttered_digits.load("test", 600, 16), cluttered_digits.load("train", 600, 16, seed=1)):
        assert other.digest != first.digest


def test_cluttered_digits_are_balanced_and_normalised():
    made = cluttered_digits.load("train", n=3000, size=16)
    assert (made.labels.bincount(minlength=10) / 300 - 1).abs().max() < 0.2
    _, mean, std = images.statistics(made.images.numpy(), made.labels.numpy())
    assert made.mean == pytest.approx(mean, abs=0.01)
    assert made.std == pytest.approx(std, abs=0.01)


def test_cluttered_digits_draw_only_handwriting_of_their_split(monkeypatch):
    asked = []
    load = digits.load
    monkeypatch.setattr(digits, "load", lambda split: asked.append(split) or load(split))
    cluttered_digits.load("test", n=4, size=16)
    assert asked == ["test"]


def test_cluttered_digits_figure(tmp_path):
    cluttered_digits.draw_samples(tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "val"}, "no split 'val'; expected train or test"),
        ({"n": 0}, "n=0 images; expected n >= 1"),
        ({"size": 8}, "size 8; expected 12 to 256 pixels"),
        ({"colour": 1}, "no option colour; expected n, size, seed"),
    ],
)
def test_cluttered_digits_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        datasets.load("cluttered_digits", **{"split": "train", **arguments})


# ------------------------------------------------------------------------------------------------ the plain form
def sample(n=30, classes=3, shape=(4, 4, 3), seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n, dtype=np.int64) % classes


def error(*arguments, **options):
    """The one line that `datasets.load` fails with."""
    with pytest.raises(UserError) as caught:
        datasets.load(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_any_folder_in_plain_form_is_a_set(tmp_path):
    for split, n in (("train", 30), ("test", 2)):
        save_npz(tmp_path / "mine" / f"{split}.npz", *sample(n))
    train, test = (datasets.load("mine", split, tmp_path) for split in ("train", "test"))
    assert "mine" in datasets.known(tmp_path)
    assert (len(train), len(test), test.classes) == (30, 2, 3)
    values = sample()[0] / 255
    assert train.mean == test.mean == pytest.approx(values.mean((0, 1, 2)))
    assert train.std == test.std == pytest.approx(values.std((0, 1, 2)))
    assert torch.equal(train.images, torch.from_numpy(sample()[0]))
    assert not list((tmp_path / "mine").glob(".*"))  # no temporary file left


def test_subset_keeps_order_and_has_its_own_digest(tmp_path):
    save_npz(tmp_path / "mine" / "train.npz", *sample())
    whole = datasets.load("mine", "train", tmp_path)
    part = whole.subset([5, 2, 9])
    assert torch.equal(part.images, whole.images[[5, 2, 9]])
    assert part.labels.tolist() == [2, 2, 0]
    assert part.digest == whole.subset(torch.tensor([9, 5, 2])).digest != whole.digest
    assert whole.subset(torch.randperm(30)).digest == whole.digest
    assert (part.classes, part.mean) == (whole.classes, whole.mean)


def test_fingerprint_is_of_the_content_and_not_of_the_order():
    pixels, labels = sample()
    reference = fingerprint(pixels, labels)
    assert reference == "d05e1da4fe3f424a092a7a5f35c9a259bd6970fa2f7f13e050c1e710028fc1d8"
    order = np.random.default_rng(1).permutation(len(labels))
    assert fingerprint(pixels[order], labels[order]) == reference
    assert fingerprint(torch.from_numpy(pixels), torch.from_numpy(labels)) == reference
    assert fingerprint(pixels, labels[order]) != reference
    pixels[3, 1, 1, 0] ^= 1
    assert fingerprint(pixels, labels) != reference


def test_unknown_names_and_splits_and_options(tmp_path):
    assert "unknown dataset 'cifar01'; expected one of cifar10, cifar100," in error("cifar01", "train", tmp_path)
    assert "did you mean cifar10?" in error("cifar01", "train", tmp_path)
    assert "imagenet does not fit in memory" in error("imagenet", "train", tmp_path)
    assert "digits has no split 'val'; expected train or test" in error("digits", "val", tmp_path)
    assert "digits takes no options, got size" in error("digits", "train", tmp_path, size=16)


def test_missing_file_says_what_gets_it(tmp_path, monkeypatch):
    message = error("cifar10", "train", tmp_path)
    assert f"{tmp_path}/cifar10/train.npz is missing" in message
    assert message.endswith(f"run: make data DATASET=cifar10 DATA={tmp_path}")
    assert "put" in error("cifar100_subset", "train", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert error("cifar10", "train").endswith("run: make data DATASET=cifar10")
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "elsewhere"))
    assert "elsewhere/cifar10/train.npz is missing" in error("cifar10", "train")


def broken(path, kind):
    """Write a set of 30 samples with one thing wrong."""
    pixels, labels = sample()
    arrays = {"images": pixels, "labels": labels}
    if kind == "no labels":
        del arrays["labels"]
    elif kind == "float images":
        arrays["images"] = pixels / 255
    elif kind == "flat images":
        arrays["images"] = pixels.reshape(30, -1)
    elif kind == "int32 labels":
        arrays["labels"] = labels.astype(np.int32)
    elif kind == "short labels":
        arrays["labels"] = labels[:-1]
    elif kind == "label range":
        labels[4] = -1
    elif kind == "pickled":
        arrays["labels"] = np.array([{}] * 30, dtype=object)
    elif kind == "empty":
        arrays = {"images": pixels[:0], "labels": labels[:0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "flipped byte":
        raw = bytearray(path.read_bytes())
        raw[600] ^= 255
        path.write_bytes(raw)
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "no bytes":
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no labels", "has no array labels; expected images and labels"),
        ("float images", "images is float64 of shape (30, 4, 4, 3); expected uint8"),
        ("flat images", "images is uint8 of shape (30, 48); expected uint8 of shape (N, H, W, C)"),
        ("int32 labels", "labels is int32 of shape (30,); expected int64 of shape (30,)"),
        ("short labels", "labels is int64 of shape (29,); expected int64 of shape (30,)"),
        ("label range", "labels run from -1 to 2; expected 0 to 2"),
        ("pickled", "is damaged or incomplete"),
        ("empty", "images is uint8 of shape (0, 4, 4, 3)"),
        ("truncated", "is damaged or incomplete (BadZipFile)"),
        ("flipped byte", "is damaged or incomplete"),
        ("text", "is damaged or incomplete"),
        ("no bytes", "is damaged or incomplete"),
    ],
)
def test_unfit_files_are_refused_by_name(tmp_path, kind, says):
    for name, mend in (("mine", "replace it by a sound copy"), ("cifar10", "make data DATASET=cifar10")):
        path = tmp_path / name / "train.npz"
        broken(path, kind)
        message = error(name, "train", tmp_path)
        assert message.startswith(str(path))
        assert mend in message
        if name == "mine":
            assert says in message


def test_wrong_count_label_and_content_of_a_published_set(tmp_path, monkeypatch):
    pixels, labels = sample()
    path = tmp_path / "cifar10" / "train.npz"
    save_npz(path, pixels, labels)
    mend = f"run: rm {path} && make data DATASET=cifar10 DATA={tmp_path}"
    message = error("cifar10", "train", tmp_path)
    assert "images has shape (30, 4, 4, 3); expected (50000, 32, 32, 3)" in message
    assert message.endswith(mend)

    tiny = Published(2, (4, 4, 3), {"train": 30}, (0.5,) * 3, (0.25,) * 3, {"train": "0" * 64})
    monkeypatch.setitem(images.PUBLISHED, "cifar10", tiny)
    assert "labels run from 0 to 2; expected 0 to 1" in error("cifar10", "train", tmp_path)
    monkeypatch.setitem(images.PUBLISHED, "cifar10", replace(tiny, classes=3))
    message = error("cifar10", "train", tmp_path)
    assert f"its fingerprint is {fingerprint(pixels, labels)}; expected {'0' * 64}" in message
    assert message.endswith(mend)


# ------------------------------------------------------------------------------------------------ official archives
def fake_archive(root, name, monkeypatch, per_file=20):
    """A CIFAR archive in the official pickle layout, with its md5 sums and counts put in place of the official ones."""
    source = official.SOURCES[name]
    key = "labels" if name == "cifar10" else "fine_labels"
    generator = np.random.default_rng(0)
    truth: dict[str, list] = {"train": [], "test": []}
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    lists = {}
    for split, files in (("train", source.train_list), ("test", source.test_list)):
        lists[split] = []
        for file, _ in files:
            rows = generator.integers(0, 256, (per_file, 3072), dtype=np.uint8)
            labels = generator.integers(0, images.PUBLISHED[name].classes, per_file).tolist()
            (folder / file).write_bytes(pickle.dumps({"data": rows, key: labels}))
            lists[split].append([file, md5(folder / file)])
            truth[split].append((rows, labels))
    (folder / source.meta["filename"]).write_bytes(pickle.dumps({source.meta["key"]: ["a", "b"]}))
    archive = root / source.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, source.base_folder)
    monkeypatch.setattr(source, "train_list", lists["train"])
    monkeypatch.setattr(source, "test_list", lists["test"])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5(folder / source.meta["filename"])})
    monkeypatch.setattr(source, "tgz_md5", md5(archive))
    counts = {split: per_file * len(truth[split]) for split in truth}
    monkeypatch.setitem(images.PUBLISHED, name, replace(images.PUBLISHED[name], counts=counts, fingerprints={}))
    return folder, archive, truth


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("kept", ["archive", "folder"])
def test_official_archives_are_converted_exactly(tmp_path, monkeypatch, capsys, name, kept):
    folder, archive, truth = fake_archive(tmp_path, name, monkeypatch)
    if kept == "folder":
        archive.unlink()
    else:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked the network"))
    assert main([name, "--root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for split in ("train", "test"):
        loaded = datasets.load(name, split, tmp_path)
        rows = np.concatenate([rows for rows, _ in truth[split]])
        assert loaded.images.shape == (len(rows), 32, 32, 3)
        # the official row is 1024 red, 1024 green, 1024 blue values, each plane row by row
        assert loaded.images[7, 3, 5].tolist() == [int(rows[7, plane * 1024 + 3 * 32 + 5]) for plane in range(3)]
        assert np.array_equal(loaded.images.numpy().transpose(0, 3, 1, 2).reshape(len(rows), -1), rows)
        assert loaded.labels.tolist() == [label for _, labels in truth[split] for label in labels]
        assert f"{name} {split}: {len(rows)} images of 32 x 32 x 3" in printed
        assert loaded.digest in printed
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["test.npz", "train.npz"]


def test_mnist_idx_files_are_converted(tmp_path, monkeypatch):
    pixels, labels = sample(12, 10, (28, 28))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        for what, array in (("images-idx3", pixels), ("labels-idx1", labels.astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(k.to_bytes(4, "big") for k in array.shape)
            (raw / f"{prefix}-{what}-ubyte").write_bytes(header + array.tobytes())
    known = replace(images.PUBLISHED["mnist"], counts={"train": 12, "test": 12}, fingerprints={})
    monkeypatch.setitem(images.PUBLISHED, "mnist", known)
    datasets.prepare("mnist", tmp_path)
    loaded = datasets.load("mnist", "train", tmp_path)
    assert np.array_equal(loaded.images[..., 0], pixels)
    assert loaded.labels.tolist() == labels.tolist()


def test_svhn_files_are_converted(tmp_path, monkeypatch):
    """Official: X (32, 32, 3, N), y (N, 1) in 1..10, where 10 is the digit 0."""
    truth, listed = {}, {}
    for split, n in (("train", 12), ("test", 8)):
        truth[split] = sample(n, 10, (32, 32, 3))
        pixels, labels = truth[split]
        file = f"{split}_32x32.mat"
        y = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
        scipy.io.savemat(tmp_path / file, {"X": pixels.transpose(1, 2, 3, 0), "y": y})
        listed[split] = ["http://nowhere", file, md5(tmp_path / file)]
    monkeypatch.setattr(official_sets.SVHN, "split_list", listed)
    known = replace(images.PUBLISHED["svhn"], counts={"train": 12, "test": 8})
    monkeypatch.setitem(images.PUBLISHED, "svhn", known)
    datasets.prepare("svhn", tmp_path)
    for split, (pixels, labels) in truth.items():
        loaded = datasets.load("svhn", split, tmp_path)
        assert np.array_equal(loaded.images, pixels)
        assert loaded.labels.tolist() == labels.tolist()


def test_stl10_files_are_converted(tmp_path, monkeypatch):
    """Official: raw bytes (N, 3, columns, rows), labels 1..10; the unlabelled images are checked and left alone."""
    folder, truth = tmp_path / "stl10_binary", {}
    folder.mkdir()
    (folder / "class_names.txt").write_text("a\nb\n")
    (folder / "unlabeled_X.bin").write_bytes(b"not read")
    for split, n in (("train", 6), ("test", 4)):
        truth[split] = sample(n, 10, (96, 96, 3))
        pixels, labels = truth[split]
        (folder / f"{split}_X.bin").write_bytes(pixels.transpose(0, 3, 2, 1).tobytes())
        (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    for name, files in (("train_list", ("train_X", "train_y", "unlabeled_X")), ("test_list", ("test_X", "test_y"))):
        sums = [[f"{file}.bin", md5(folder / f"{file}.bin")] for file in files]
        monkeypatch.setattr(official_sets.STL10, name, sums)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked the network"))
    known = replace(images.PUBLISHED["stl10"], counts={"train": 6, "test": 4})
    monkeypatch.setitem(images.PUBLISHED, "stl10", known)
    datasets.prepare("stl10", tmp_path)
    for split, (pixels, labels) in truth.items():
        loaded = datasets.load("stl10", split, tmp_path)
        assert np.array_equal(loaded.images, pixels)
        assert loaded.labels.tolist() == labels.tolist()


def test_conversion_leaves_nothing_behind_when_the_content_is_wrong(tmp_path, monkeypatch):
    fake_archive(tmp_path, "cifar10", monkeypatch)
    known = replace(images.PUBLISHED["cifar10"], fingerprints={"train": "0" * 64})
    monkeypatch.setitem(images.PUBLISHED, "cifar10", known)
    with pytest.raises(UserError, match="make data DATASET=cifar10"):
        datasets.prepare("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()


def test_no_archive_and_no_network_is_one_line(tmp_path, monkeypatch, capsys):
    def offline(*_, **__):
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(official_sets.CIFAR10, "download", offline)
    assert main(["cifar100", "--root", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "(Name or service not known)" in message
    assert f"make data DATASET=cifar100 DATA={tmp_path}" in message


def test_data_step_of_embedded_unknown_and_own_sets(tmp_path, capsys):
    assert main(["digits", "--root", str(tmp_path)]) == 0
    assert "digits is embedded: nothing to fetch" in capsys.readouterr().out
    assert main(["nonsense", "--root", str(tmp_path)]) == 2
    assert "unknown dataset 'nonsense'" in capsys.readouterr().err
    save_npz(tmp_path / "mine" / "test.npz", *sample())  # a set may have one split only
    assert main(["mine", "--root", str(tmp_path)]) == 0
    assert "mine test: 30 images of 4 x 4 x 3, 3 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("cifar10", ["cifar-10-python.tar.gz"]),
        ("cifar10", ["cifar10/train.npz", "cifar10/test.npz"]),
        ("large_canvas_cifar10", ["cifar-10-batches-py/data_batch_1"]),
        ("cifar100", ["cifar-100-python/train"]),
        ("mnist", ["MNIST/raw/train-images-idx3-ubyte"]),
        ("svhn", ["train_32x32.mat", "test_32x32.mat"]),
        ("stl10", ["stl10_binary.tar.gz"]),
    ],
)
def test_what_is_at_hand_is_told_without_a_download(tmp_path, monkeypatch, name, files):
    monkeypatch.setattr(datasets, "prepare", None)  # calling it would fail
    for file in files:
        assert not datasets.available(name, tmp_path)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert datasets.available(name, tmp_path)


def test_every_set_that_is_fetched_has_archives_to_look_for():
    assert official.ARCHIVES.keys() == official.SOURCES.keys()


def test_other_sets_are_at_hand_when_they_are_there(tmp_path, tree):
    for name in ("digits", "large_canvas", "digit_scenes", "synthetic_people"):
        assert datasets.available(name, tmp_path / "nowhere"), name
    for name in ("imagenet", "coco", "bccd", "market1501", "mine", "cifar100_subset"):
        assert not datasets.available(name, tmp_path / "nowhere"), name
    save_npz(tmp_path / "mine" / "test.npz", *sample())
    assert datasets.available("mine", tmp_path)
    assert not datasets.available("imagenet", tree)  # three of a thousand classes


# ------------------------------------------------------------------------------------------------ folder trees
@pytest.fixture
def tree(tmp_path):
    """Three classes of 6 training and 2 validation images, each of one grey level."""
    for split, n in (("train", 6), ("val", 2)):
        for label in range(3):
            folder = tmp_path / "imagenet" / split / f"n0000000{label}"
            folder.mkdir(parents=True)
            for k in range(n):
                Image.new("RGB", (12, 10), (40 * label + 5 * k,) * 3).save(folder / f"{k}.JPEG", quality=95)
    return tmp_path


def test_imagenet_check_counts(tree, capsys):
    with pytest.raises(UserError, match=r"3 classes of 1,000, 18 files of 1,281,167.*--allow-partial"):
        imagenet.check(tree)
    assert main(["imagenet", "--root", str(tree), "--allow-partial"]) == 0
    assert "imagenet val: 3 classes of 1,000, 6 files of 50,000" in capsys.readouterr().out
    assert main(["imagenet", "--root", str(tree)]) == 2


def test_imagenet_complete(tree, monkeypatch):
    monkeypatch.setattr(imagenet, "CLASSES", 3)
    monkeypatch.setattr(imagenet, "FILES", {"train": 18, "val": 6})
    assert imagenet.check(tree).endswith("complete")
    datasets.prepare("imagenet", tree)


def test_image_folder_labels_and_chosen_classes(tree):
    whole = imagenet.image_folder("train", tree)
    assert (len(whole), whole.classes) == (18, ["n00000000", "n00000001", "n00000002"])
    image, label = whole[17]
    assert (image.mode, image.size, label) == ("RGB", (12, 10), 2)
    chosen = imagenet.image_folder("val", tree, classes=["n00000002", "n00000000"])
    assert chosen.classes == ["n00000002", "n00000000"]
    assert {(path.split("/")[-2], label) for path, label in chosen.samples} == {("n00000002", 0), ("n00000000", 1)}
    assert len(chosen) == 4
    assert pickle.loads(pickle.dumps(chosen)).samples == chosen.samples  # workers of macOS get it that way


def test_imagenet_errors(tree):
    with pytest.raises(
        UserError, match=r"imagenet/train is missing or has no class folders.*make data DATASET=imagenet"
    ):
        imagenet.image_folder("train", tree / "nowhere")
    with pytest.raises(UserError, match="no split 'test'; expected train or val"):
        imagenet.image_folder("test", tree)
    with pytest.raises(UserError, match="no class folder n9"):
        imagenet.image_folder("train", tree, classes=["n9"])
    (tree / "imagenet" / "train" / "n00000009").mkdir()
    with pytest.raises(UserError, match="no image in class folder n00000009"):
        imagenet.image_folder("train", tree)
    with pytest.raises(UserError, match="n00000009 holds no image"):
        imagenet.check(tree, allow_partial=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_is_named_in_one_line(tree, workers):
    bad = tree / "imagenet" / "train" / "n00000001" / "3.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    loader = imagenet.folder_loader(imagenet.image_folder("train", tree, transforms.ToTensor()), 6, 0, 0, workers)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"{bad} does not open as an image")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ folder_loader
class Noisy(torch.utils.data.Dataset):
    """Sample k gives k and one draw of each global generator: shows what its random transforms would do."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return index, torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002


def epoch_of(workers=0, epoch=0, seed=0, batch_size=4, **options):
    loader = imagenet.folder_loader(Noisy(), batch_size, seed, epoch, workers, **options)
    return [[column.tolist() for column in batch] for batch in loader]


def draws(batches):
    """Sample index -> its three draws."""
    return {index: values for batch in batches for index, *values in zip(*batch, strict=True)}


def test_folder_loader_is_the_same_for_every_number_of_workers_and_start():
    reference = epoch_of()
    assert len(reference) == 5
    assert epoch_of(workers=2) == reference
    assert epoch_of(start_batch=3) == epoch_of(workers=2, start_batch=3) == reference[3:]
    assert epoch_of(start_batch=5) == []


def test_folder_loader_augmentation_depends_on_seed_epoch_and_index():
    reference = draws(epoch_of(drop_last=False))
    assert sorted(reference) == list(range(23))
    assert len({tuple(values) for values in reference.values()}) == 23
    assert draws(epoch_of(batch_size=7, drop_last=False)) == reference
    assert draws(epoch_of(epoch=1, drop_last=False))[0] != reference[0]
    assert draws(epoch_of(seed=1, drop_last=False))[0] != reference[0]
    ranks = [draws(epoch_of(rank=r, world=2, drop_last=False)) for r in range(2)]
    assert not ranks[0].keys() & ranks[1].keys()
    assert ranks[0] | ranks[1] == reference


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_loader_draws_nothing_from_the_global_generators(workers):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    expected = torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    epoch_of(workers)
    after = torch.rand(3), np.random.rand(), random.random()  # noqa: NPY002
    assert torch.equal(after[0], expected[0])
    assert after[1:] == expected[1:]


def test_folder_loader_bad_arguments():
    with pytest.raises(UserError, match="batch size 24 does not fit 23 samples on 1 ranks"):
        imagenet.folder_loader(Noisy(), 24, 0, 0, 0)
    with pytest.raises(UserError, match="rank 2 of 2"):
        imagenet.folder_loader(Noisy(), 4, 0, 0, 0, rank=2, world=2)


# ------------------------------------------------------------------------------------------------ class_fraction_split
def test_class_fraction_split_is_exact_disjoint_and_keyed():
    targets = [0] * 400 + [1] * 200 + [2] * 40
    first, second = imagenet.class_fraction_split(targets, (0.10, 0.025), seed=0)
    assert torch.tensor(targets)[first].bincount().tolist() == [40, 20, 4]
    assert torch.tensor(targets)[second].bincount().tolist() == [10, 5, 1]
    assert not set(first.tolist()) & set(second.tolist())
    again = imagenet.class_fraction_split(torch.tensor(targets), (0.10, 0.025), seed=0)
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)
    assert not torch.equal(imagenet.class_fraction_split(targets, (0.10, 0.025), seed=1)[0], first)
    parts = imagenet.class_fraction_split([0] * 7 + [1] * 5, (0.5, 0.5), seed=0)
    assert sorted(torch.cat(parts).tolist()) == list(range(12))


def test_class_fraction_split_bad_arguments():
    with pytest.raises(UserError, match="sum at most 1"):
        imagenet.class_fraction_split([0, 1], (0.8, 0.3), 0)
    with pytest.raises(UserError, match="class 0 has only 2 samples"):
        imagenet.class_fraction_split([0, 0], (0.1,), 0)
