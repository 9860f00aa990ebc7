"""Person re-identification sets: official trees with their names and counts; the generated set and what its flags say."""

import pytest
import torch
from PIL import Image

from common.datasets import person_reid, synthetic_people
from common.datasets.__main__ import main
from common.datasets.person_reid import OFFICIAL, batches, load
from common.errors import UserError
from common.runtime import World

ONE = World(0, 1, torch.device("cpu"))
NAMES = {  # of each set: names in each split, as the official archives have them
    "market1501": {
        "train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000301_01.jpg", "0007_c3s3_077419_03.jpg"],
        "query": ["0003_c1s6_015971_00.jpg"],
        "gallery": ["-1_c1s1_000401_03.jpg", "0000_c2s1_000151_01.jpg", "0003_c4s6_015641_03.jpg"],
    },
    "dukemtmc_reid": {
        "train": ["0001_c2_f0046182.jpg", "0001_c7_f0047002.jpg"],
        "query": ["0005_c2_f0046985.jpg"],
        "gallery": ["0005_c5_f0051781.jpg", "7139_c8_f0000001.jpg"],
    },
    "cuhk03_np_detected": {
        "train": ["0001_c1_1.png", "0001_c2_6.png"],
        "query": ["0003_c1_21.png"],
        "gallery": ["0003_c2_26.png", "0003_c2_27.png"],
    },
    "cuhk03_np_labeled": {  # names made from the .mat file: camera pair, person, camera, image
        "train": ["1_001_1_01.png", "1_001_2_06.png"],
        "query": ["2_003_1_01.png"],
        "gallery": ["2_003_2_07.png", "1_003_2_07.png"],
    },
}
READ = {  # identities and cameras of the gallery above
    "market1501": ([-1, 0, 3], [1, 2, 4]),
    "dukemtmc_reid": ([5, 7139], [5, 8]),
    "cuhk03_np_detected": ([3, 3], [2, 2]),
    "cuhk03_np_labeled": ([10003, 20003], [2, 2]),
}


def plant(root, name, names=None):
    """A tree under its official name with these files: small pictures, each of one colour."""
    for split, files in (names or NAMES[name]).items():
        folder = root / OFFICIAL[name].folder / person_reid.FOLDERS[split]
        folder.mkdir(parents=True, exist_ok=True)
        for k, file in enumerate(files):
            Image.new("RGB", (8, 16), (10 * k, 0, 255)).save(folder / file)
    (folder / "Thumbs.db").write_bytes(b"")  # the Market-1501 archive has one in every folder
    return root


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_say_identity_and_camera(tmp_path, name):
    plant(tmp_path, name)
    gallery = load(name, "gallery", tmp_path, partial=True)
    assert (gallery.ids.tolist(), gallery.cameras.tolist()) == READ[name]
    assert gallery.ids.dtype == gallery.cameras.dtype == torch.int64
    assert [path.name for path in gallery.paths] == sorted(NAMES[name]["gallery"])
    train = load(name, "train", tmp_path, partial=True)
    assert train.labels.max() + 1 == len(train.identities)
    assert train.picture(0).shape == (16, 8, 3)


def test_counts_are_those_of_the_official_sets(tmp_path, monkeypatch):
    """The rules on a small set: images, identities without -1 and 0, and how many of the gallery are -1 and 0."""
    for name, official in OFFICIAL.items():
        assert set(official.counts) == set(person_reid.SPLITS), name
    market = OFFICIAL["market1501"]
    assert market.counts["gallery"][0] == 3_819 + 2_798 + 13_115
    plant(tmp_path, "market1501")
    with pytest.raises(UserError, match="3 images where 12,936 are expected; 2 identities where 751 are expected"):
        load("market1501", "train", tmp_path)
    counts = {"train": (3, 2), "query": (1, 1), "gallery": (3, 1)}
    small = person_reid.Official(market.folder, counts, {-1: 1, 0: 1})
    monkeypatch.setitem(OFFICIAL, "market1501", small)
    assert len(load("market1501", "gallery", tmp_path)) == 3
    told = person_reid.check("market1501", tmp_path)
    assert "market1501 gallery: 3 images of 1 identities on 3 cameras" in told
    gallery = tmp_path / market.folder / "bounding_box_test"
    (gallery / "0000_c2s1_000151_01.jpg").rename(gallery / "0004_c2s1_000151_01.jpg")
    with pytest.raises(UserError, match=r"2 identities where 1 are expected; 0 images of 0 where 1 are expected"):
        load("market1501", "gallery", tmp_path)


@pytest.mark.parametrize(
    ("name", "splits"), [("market1501", ("query", "gallery")), ("cuhk03_np_detected", ("train", "gallery"))]
)
def test_a_tree_of_the_official_size_is_accepted(tmp_path, name, splits):
    """Empty files under official names, as many and of as many people as the official sets have; one more is refused."""
    official = OFFICIAL[name]
    for split in splits:
        images, people = official.counts[split]
        folder = tmp_path / official.folder / person_reid.FOLDERS[split]
        folder.mkdir(parents=True)
        strays = [stray for stray, n in official.strays.items() for _ in range(n)] if split == "gallery" else []
        ids = strays + [1 + k % people for k in range(images - len(strays))]
        end = "jpg" if name == "market1501" else "png"
        for k, identity in enumerate(ids):
            (folder / f"{identity:04}_c{1 + k % 2}s1_{k:06}_00.{end}").touch()
        found = load(name, split, tmp_path)
        assert (len(found), int((found.identities > 0).sum())) == (images, people)
        assert int((found.ids == -1).sum()) == (3_819 if strays else 0)
        assert int((found.ids == 0).sum()) == (2_798 if strays else 0)
        (folder / f"0001_c1s1_999999_00.{end}").touch()
        with pytest.raises(
            UserError, match=f"holds {images + 1:,} images where {images:,} are expected; it is not the"
        ):
            load(name, split, tmp_path)


def test_bad_trees_are_told_in_one_line(tmp_path, capsys):
    for split, what in (("train", "bounding_box_train"), ("query", "query")):
        with pytest.raises(UserError, match=f"{what} is missing or has no images; expected files like 0002_c1s1"):
            load("market1501", split, tmp_path)
    plant(tmp_path, "market1501", {"train": ["0002_c1s1_000451_03.jpg", "portrait.jpg"]})
    with pytest.raises(UserError, match=r"portrait.jpg does not say who it shows and on which camera; expected a name"):
        load("market1501", "train", tmp_path, partial=True)
    plant(tmp_path, "dukemtmc_reid", {"query": ["1_001_1_01.png"]})
    with pytest.raises(UserError, match="does not say who"):
        load("dukemtmc_reid", "query", tmp_path, partial=True)
    for args, message in (
        (("market", "train"), "unknown person re-identification set 'market'; expected one of market1501, "),
        (("market1501", "test"), "no split 'test'; expected one of train, query, gallery"),
    ):
        with pytest.raises(UserError, match=message):
            load(*args, tmp_path)
    with pytest.raises(UserError, match="market1501 takes no options, got size"):
        load("market1501", "train", tmp_path, size=64)
    assert main(["market1501", "--root", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_files_are_resized_flipped_and_numbered(tmp_path):
    plant(tmp_path, "market1501")
    train = load("market1501", "train", tmp_path, partial=True)
    loader = batches(train, 3, seed=0, world=ONE, train=True, size=(24, 12), workers=0)
    (x, y), *more = list(loader.epoch(0))
    assert more == []
    image = Image.open(train.paths[0])
    image.putpixel((0, 0), (255, 255, 255))
    image.save(train.paths[0].with_suffix(".png"))  # a JPEG would blur the corner
    marked = person_reid.People(
        "market1501", "train", train.ids[:1], train.cameras[:1], "", paths=(train.paths[0].with_suffix(".png"),)
    )
    one = batches(marked, 1, seed=0, world=ONE, train=True, size=(16, 8), workers=0)
    sides = {bool(x[0, 1, 0, 0] > x[0, 1, 0, -1]) for epoch in range(12) for x, _ in one.epoch(epoch)}
    assert sides == {True, False}, "mirrored in some epochs"
    assert x.shape == (3, 3, 24, 12)
    assert sorted(y.tolist()) == [0, 0, 1]
    gallery = load("market1501", "gallery", tmp_path, partial=True)
    found = {}
    for x, index in batches(gallery, 3, 0, ONE, train=False, size=(24, 12), workers=0).epoch(0):
        found |= dict(zip(index.tolist(), x, strict=True))
    mean, std = torch.tensor(gallery.mean)[:, None, None], torch.tensor(gallery.std)[:, None, None]
    for k in range(3):
        expected = (torch.tensor([10 * k / 255, 0, 1])[:, None, None] - mean) / std
        assert (found[k] - expected).abs().max() < 0.05, "a picture of one colour stays one"
    (tmp_path / "Market-1501-v15.09.15/query/0003_c1s6_015971_00.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="does not open as an image"):
        list(batches(load("market1501", "query", tmp_path, True), 1, 0, ONE, False, workers=0).epoch(0))
    with pytest.raises(UserError, match="batch size 4"):
        batches(train, 4, 0, ONE, train=True, workers=0)


# ---------------------------------------------------------------------------------------------- the generated set
@pytest.mark.parametrize(
    ("split", "size", "digest"),
    [
        ("train", 64, "7fd86338225063cb9af7ac48152154a9283168949c648ddec6d250b0eceaca0e"),
        ("query", 96, "cc52d9b9d79a501cded88edf084662f995ec3fd809a22a3b1e1740df9446e1b0"),
    ],
)
def test_images_are_golden(split, size, digest):
    """The same with every set of vector instructions and number of threads (ATEN_CPU_CAPABILITY=default, avx2, avx512)."""
    made = load("synthetic_people", split, identities=20, size=size)
    assert made.images.shape[1:] == (size, size * 3 // 8, 3)
    assert made.images.dtype == torch.uint8
    assert made.digest == digest


def test_a_pure_function_of_the_arguments():
    state = torch.get_rng_state()
    first = synthetic_people.load("train", identities=12)
    assert torch.equal(torch.get_rng_state(), state)
    prefix = synthetic_people.load("train", identities=9)  # chunks end elsewhere
    assert torch.equal(prefix.images, first.images[: 9 * 16])
    assert torch.equal(prefix.ids, first.ids[: 9 * 16])
    for other in ({"seed": 1}, {"shift": 0.1}, {"occlusion": 0.9}, {"size": 72}):
        assert synthetic_people.load("train", identities=12, **other).digest != first.digest


def test_every_person_is_on_every_camera_and_splits_share_nobody():
    parts = {split: load("synthetic_people", split, identities=10) for split in person_reid.SPLITS}
    assert [len(part) for part in parts.values()] == [160, 40, 120]
    for split, per_camera in (("train", 4), ("query", 1), ("gallery", 3)):
        pairs = torch.stack([parts[split].ids, parts[split].cameras]).unique(dim=1, return_counts=True)
        assert pairs[0].shape[1] == 40
        assert set(pairs[1].tolist()) == {per_camera}
    assert torch.equal(parts["query"].identities, parts["gallery"].identities)
    assert not set(parts["train"].ids.tolist()) & set(parts["query"].ids.tolist())
    images = torch.cat([part.images.flatten(1) for part in parts.values()])
    assert len(images.unique(dim=0)) == 320, "no image twice"
    streams = []
    people = synthetic_people._people
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_people, "_people", lambda draw: streams.append(people(draw)) or streams[-1])
        for split in ("train", "gallery"):
            synthetic_people.load(split, identities=10)
    assert not torch.equal(streams[0]["torso"], streams[1]["torso"]), "people of their own"


def test_flags_say_what_obstacle_and_box_did():
    """Clean, occluded and shifted queries are the same images but for that."""
    arms = {"clean": (0, 0), "occluded": (1, 0), "shifted": (0, 0.15)}
    clean, occluded, shifted = (
        synthetic_people.load("query", identities=30, occlusion=p, shift=s) for p, s in arms.values()
    )
    assert not clean.flags["occluded"].any()
    assert not clean.flags["shift"].any()
    assert occluded.flags["occluded"].all()
    assert set(occluded.flags["occluder"].tolist()) == {1, 2, 3}
    changed = (clean.images.int() - occluded.images.int()).abs().amax(3).float().mean(2)  # of each row
    for third in (1, 2, 3):
        rows = changed[occluded.flags["occluder"] == third].mean(0)
        share = [part.sum() / rows.sum() for part in rows.tensor_split(3)]
        assert share[third - 1] > 0.8, "the obstacle is up to 0.06 longer at either side: 1/3 of 1/3 + 0.06 on average"
    assert (shifted.flags["shift"].abs() <= 0.15).all()
    assert torch.equal(shifted.flags["shifted"], shifted.flags["shift"].abs() > 0.05)
    assert 0.5 < shifted.flags["shifted"].float().mean() < 0.8, "two thirds"
    mixed = synthetic_people.load("train", identities=100)
    assert mixed.flags["occluded"].float().mean() == pytest.approx(0.4, abs=0.04)


def test_the_person_moves_by_the_shift(monkeypatch):
    """Against a scene of one grey, without noise: the topmost pixel of the body moves by shift x height."""
    views = synthetic_people._views

    def bare(draw, size):
        found, scenes = views(draw, size)
        found["matrix"] = torch.eye(3).expand_as(found["matrix"])
        return found, torch.zeros_like(scenes)

    monkeypatch.setattr(synthetic_people, "_views", bare)
    monkeypatch.setattr(synthetic_people, "_expose", lambda canvas, *_: canvas)
    tops = []
    for shift in (0, 0.15):
        made = synthetic_people.load("query", identities=20, size=128, occlusion=0, shift=shift)
        tops.append((made.images.amax((2, 3)) > 12).int().argmax(1))
    moved = (tops[1] - tops[0]) / 128
    inside = tops[1] > 0
    assert inside.float().mean() > 0.6
    assert (moved - made.flags["shift"])[inside].abs().max() < 0.02


def test_cameras_differ_more_than_images_of_one():
    made = synthetic_people.load("train", identities=60, occlusion=0)
    colour = made.images.float().mean((1, 2)).view(60, 4, 4, 3)
    between = colour.mean((0, 2)).std(0).mean()
    assert between > 2 * colour.mean(0).std(1).mean()


def test_subset_keeps_what_belongs_to_each_image():
    made = load("synthetic_people", "train", identities=4)
    one = made.subset(made.cameras == 2)
    assert len(one) == 16
    assert one.cameras.unique().tolist() == [2]
    index = (made.cameras == 2).nonzero()[:, 0]
    assert torch.equal(one.images, made.images[index])
    assert torch.equal(one.flags["shift"], made.flags["shift"][index])
    assert one.digest != made.digest
    assert one.labels.tolist() == [k for k in range(4) for _ in range(4)]
    assert torch.equal(made.subset(index).ids, one.ids)


def test_batches_of_images_in_memory():
    made = load("synthetic_people", "query", identities=40)
    x, index = zip(*batches(made, 8, 0, ONE, train=False).epoch(0), strict=True)
    assert torch.equal(torch.cat(index), torch.arange(160))
    mean, std = (torch.tensor(t)[:, None, None] for t in (made.mean, made.std))
    assert ((torch.cat(x) * std + mean) * 255).round().byte().equal(made.images.permute(0, 3, 1, 2))
    x, labels = (torch.cat(parts) for parts in zip(*batches(made, 8, 0, ONE, train=True).epoch(0), strict=True))
    assert labels.bincount().tolist() == [4] * 40
    pixels = ((x * std + mean) * 255).round().byte().flatten(1)
    plain = made.images.permute(0, 3, 1, 2)
    as_they_are, mirrored = (
        (pixels[:, None] == t.flatten(1)[None]).all(2).any(1) for t in (plain, plain.flip(3))
    )  # fmt: skip
    assert (as_they_are ^ mirrored).all()
    assert 0.35 < mirrored.float().mean() < 0.65, "half of them, each with probability 1/2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"identities": 0}, "0 identities"),
        ({"split": "query", "per_camera": 1}, "1 images of each on each.*two images"),
        ({"size": 30}, "size 30; expected a multiple of 8, 32 to 256"),
        ({"occlusion": 1.5}, "occlusion is 1.5"),
        ({"shift": -0.1}, "shift -0.1"),
        ({"split": "test"}, "no split 'test'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        synthetic_people.load(**{"split": "train", **arguments})


def test_data_step_and_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(synthetic_people.IDENTITIES, "train", 3)
    monkeypatch.setitem(synthetic_people.IDENTITIES, "test", 2)
    monkeypatch.setattr(person_reid, "_synthetic", synthetic_people.load)  # nothing of these sizes is to be remembered
    assert main(["synthetic_people", "--root", str(tmp_path)]) == 0
    assert "synthetic_people train: 48 images of 3 identities on 4 cameras" in capsys.readouterr().out
    synthetic_people.draw_samples(tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as figure:
        assert figure.size[0] > 500
