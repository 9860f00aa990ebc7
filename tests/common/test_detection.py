"""Sets with boxes from files: what is kept, clipped, passed over or refused, and how images are served."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common import datasets
from common.datasets import detection
from common.datasets.__main__ import main
from common.datasets.pictures import read_picture, served_size
from common.errors import UserError


def photograph(width, height, seed=0):
    """Smooth colours, which survive JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def refused(*args, **options):
    with pytest.raises(UserError) as error:
        detection.load(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ COCO
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}, {"id": 18, "name": "dog"}]
IMAGES = [  # not in the order of their ids
    {"id": 7, "file_name": "000007.jpg", "width": 64, "height": 48},
    {"id": 2, "file_name": "000002.jpg", "width": 40, "height": 60},
    {"id": 5, "file_name": "000005.jpg", "width": 30, "height": 30},
]
ANNOTATIONS = [
    {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 8], "area": 150.5, "iscrowd": 0},
    {"id": 2, "image_id": 2, "category_id": 90, "bbox": [0.5, 1.25, 10, 20], "area": 77, "iscrowd": 1},
    {"id": 3, "image_id": 7, "category_id": 18, "bbox": [50, -4, 20, 10], "area": 99, "iscrowd": 0},  # stands out
    {"id": 4, "image_id": 7, "category_id": 18, "bbox": [64, 0, 20, 10], "area": 99, "iscrowd": 0},  # outside
    {"id": 5, "image_id": 7, "category_id": 18, "bbox": [5, 5, 0, 10], "area": 0, "iscrowd": 0},  # without area
]


def coco_tree(root, pixels=True, **changes):
    content = {"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES} | changes
    (root / "coco" / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "coco" / "val2017").mkdir(exist_ok=True)
    for image in IMAGES:
        path = root / "coco" / "val2017" / image["file_name"]
        if pixels:
            photograph(image["width"], image["height"], image["id"]).save(path)
        else:
            path.write_bytes(b"x" * image["id"])
    (root / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return root


def test_coco(tmp_path):
    made = detection.load("coco", "val", coco_tree(tmp_path))
    assert (made.name, made.split, len(made)) == ("coco", "val", 3)
    assert made.classes == ("toothbrush", "car", "dog")
    assert made.class_ids == (90, 3, 18)
    assert [made.image_id(i) for i in range(3)] == [2, 5, 7]
    assert [made.size(i) for i in range(3)] == [(60, 40), (30, 30), (48, 64)]
    assert made.file(2) == str(tmp_path / "coco/val2017/000007.jpg")
    assert made.passed_over == {"box without area": 1, "box outside the image": 1}
    crowd, empty, two = (made.truth(i) for i in range(3))
    assert crowd.boxes.tolist() == [[0.5, 1.25, 10.5, 21.25]]
    assert (crowd.labels.tolist(), crowd.crowd.tolist(), crowd.area.tolist()) == ([0], [True], [77])
    assert [tuple(values.shape) for values in vars(empty).values()] == [(0, 4), (0,), (0,), (0,)]
    assert two.boxes.tolist() == [[10, 20, 40, 28], [50, 0, 64, 6]]
    assert (two.labels.tolist(), two.crowd.tolist(), two.area.tolist()) == ([1, 2], [False, False], [150.5, 99])
    for truth in (crowd, empty, two):
        dtypes = [values.dtype for values in vars(truth).values()]
        assert dtypes == [torch.float32, torch.int64, torch.bool, torch.float32]
    for i in range(3):
        assert made.image(i).shape == (3, *made.size(i))
        assert made.image(i).dtype == torch.uint8
        with Image.open(made.file(i)) as image:
            assert torch.equal(made.image(i), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_shrinking_takes_boxes_and_areas_along(tmp_path):
    root = coco_tree(tmp_path)
    made, whole = detection.load("coco", "val", root, longest_side=32), detection.load("coco", "val", root)
    assert [made.size(i) for i in range(3)] == [
        (32, 21),
        (30, 30),
        (24, 32),
    ]  # 40 * 32 / 60 = 21.3; 30 is left as it is
    assert made.truth(2).boxes.tolist() == [[5, 10, 20, 14], [25, 0, 32, 3]]
    assert made.truth(2).area.tolist() == [150.5 / 4, 99 / 4]
    assert made.truth(0).boxes[0].tolist() == pytest.approx(
        [0.5 * 21 / 40, 1.25 * 32 / 60, 10.5 * 21 / 40, 21.25 * 32 / 60]
    )
    assert made.truth(0).area.tolist() == pytest.approx([77 * 21 / 40 * 32 / 60])
    assert torch.equal(made.image(1), whole.image(1))
    assert made.image(0).shape == (3, 32, 21)
    assert made.digest == whole.digest
    pairs = whole.image(2).float().unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).mean((2, 4))
    assert (made.image(2) - pairs).abs().mean() < 2


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = read_picture(tmp_path / "stripes.png", 64, 64, 16)
    assert (small.float() - 127.5).abs().max() < 16  # single pixels, picked, would be 0 or 255


@pytest.mark.parametrize(
    ("size", "longest_side", "served"),
    [
        ((480, 640), 0, (480, 640)),
        ((480, 640), 640, (480, 640)),
        ((480, 640), 191, (143, 191)),
        ((1, 900), 30, (1, 30)),
    ],
)
def test_served_size(size, longest_side, served):
    assert served_size(*size, longest_side) == served


def test_the_cache_changes_nothing(tmp_path, monkeypatch):
    root = coco_tree(tmp_path)
    for longest_side in (0, 32):
        lazy = detection.load("coco", "val", root, longest_side)
        kept = detection.load("coco", "val", root, longest_side, cache=True)
        assert isinstance(kept.images, list)
        assert all(torch.equal(lazy.image(i), kept.image(i)) for i in range(3))
    monkeypatch.setattr(Image, "open", None)
    assert kept.image(1).shape == (3, 30, 30)


def test_the_digest_is_of_annotations_and_file_sizes(tmp_path):
    digest = detection.load("coco", "val", coco_tree(tmp_path / "a", pixels=False)).digest
    assert digest == "64120392432efd1365e5e94f18906532e8fb33689a6e602dcbc1a8e8d84de95c"
    assert detection.load("coco", "val", coco_tree(tmp_path / "b", pixels=False, images=IMAGES[::-1])).digest == digest
    extra = [{**ANNOTATIONS[3], "id": 9}, *ANNOTATIONS]  # is passed over
    assert detection.load("coco", "val", coco_tree(tmp_path / "b", pixels=False, annotations=extra)).digest == digest
    moved = [{**ANNOTATIONS[0], "bbox": [10, 20, 30, 9]}, *ANNOTATIONS[1:]]
    renamed = [{"id": 90, "name": "brush"}, *CATEGORIES[1:]]
    larger = [{**ANNOTATIONS[0], "area": 151}, *ANNOTATIONS[1:]]
    for changes in ({"annotations": moved}, {"categories": renamed}, {"annotations": larger}):
        assert detection.load("coco", "val", coco_tree(tmp_path / "b", pixels=False, **changes)).digest != digest
    root = coco_tree(tmp_path / "b", pixels=False)
    (root / "coco/val2017/000005.jpg").write_bytes(b"longer than it was")
    assert detection.load("coco", "val", root).digest != digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"annotations": [{**ANNOTATIONS[0], "category_id": 4}]},
            "annotation 1 has category 4; expected one that the file",
        ),
        (
            {"annotations": [{**ANNOTATIONS[0], "image_id": 8}]},
            "annotation 1 is of image 8; expected one that the file lists",
        ),
        ({"annotations": [{**ANNOTATIONS[0], "bbox": [1, 2, 3]}]}, "is broken or not in COCO's form (ValueError: "),
        (
            {"annotations": [{**ANNOTATIONS[0], "bbox": [1, 2, float("nan"), 3]}]},
            "has the box [1, 2, nan, 3]; expected finite",
        ),
        ({"images": [*IMAGES, IMAGES[0]]}, "lists images with the same id"),
        ({"categories": "none"}, "is broken or not in COCO's form (TypeError: "),
        ({"images": []}, "annotation 1 is of image 7"),
        ({"images": [], "annotations": []}, "coco val in "),
    ],
)
def test_coco_that_contradicts_itself(tmp_path, changes, message):
    assert message in refused("coco", "val", coco_tree(tmp_path, pixels=False, **changes))


def test_broken_json_missing_images_and_missing_splits(tmp_path):
    root = coco_tree(tmp_path, pixels=False)
    assert "has no split 'train'; expected val" in refused("coco", "train", root)
    for image in IMAGES[:2]:
        (root / "coco/val2017" / image["file_name"]).unlink()
    message = refused("coco", "val", root)
    assert (
        f"2 of 3 images of instances_val2017.json are missing in {root}/coco/val2017, 000007.jpg among them" in message
    )
    path = root / "coco/annotations/instances_val2017.json"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is broken or not in COCO's form (JSONDecodeError: " in refused("coco", "val", root)
    path.unlink()
    message = refused("coco", "val", root)
    assert (
        f"{root}/coco holds no annotations; expected a set in the layout of COCO or VOC; unpack train2017.zip"
        in message
    )


# ------------------------------------------------------------------------------------------------ VOC
def xml(*objects, size=(64, 48)):
    found = "".join(
        f"<object><name> {name} </name><difficult>0</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}"
        f"</xmax><ymax>{y2}</ymax></bndbox><part><name>head</name></part></object>"
        for name, x1, y1, x2, y2 in objects
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation><filename>wrong.jpg</filename>{size}{found}</annotation>"


CELLS = {
    "cell_1": xml(("RBC", 1, 1, 64, 48), ("Platelets", 11, 12, 20, 22)),
    "cell_2": xml(
        ("RBC", 504, 1, 510, 7), ("RBC", 5, 5, 5, 5), ("RBC", 60, 40, 70, 50)
    ),  # outside, a click, stands out
    "cell_3": xml(),
    "cell_4": xml(("WBC", 0, 0, 9.5, 9), size=None),
}
LISTS = {"train": "cell_2\ncell_1\n\n", "val": "cell_3", "test": "cell_4 1\n"}


def voc_tree(root, annotations=CELLS, lists=LISTS, below="BCCD"):
    folder = root / "bccd" / below
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for k, (stem, text) in enumerate(annotations.items()):
        (folder / "Annotations" / f"{stem}.xml").write_text(text)
        photograph(64, 48, k).save(folder / "JPEGImages" / f"{stem}.{'png' if k == 1 else 'jpg'}")
    for split, names in lists.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(names)
    return folder


@pytest.mark.parametrize("below", ["BCCD", "."])
def test_voc(tmp_path, below):
    folder = voc_tree(tmp_path, below=below)
    assert detection.splits("bccd", tmp_path) == ["train", "val", "test"]
    train, val, test = (detection.load("bccd", split, tmp_path) for split in ("train", "val", "test"))
    assert train.classes == val.classes == test.classes == ("Platelets", "RBC", "WBC")  # of all splits; parts are none
    assert [train.image_id(i) for i in range(2)] == ["cell_1", "cell_2"]
    assert train.file(1) == str(folder / "JPEGImages" / "cell_2.png")
    assert train.truth(0).boxes.tolist() == [[0, 0, 64, 48], [10, 11, 20, 22]]  # first and last pixel, counted from 1
    assert train.truth(0).labels.tolist() == [1, 0]
    assert train.truth(0).area.tolist() == [64 * 48, 110]
    assert train.truth(1).boxes.tolist() == [[59, 39, 64, 48]]
    assert train.passed_over == {"box without area": 1, "box outside the image": 1}
    assert len(val.truth(0)) == 0
    assert val.passed_over == {}
    assert test.truth(0).boxes.tolist() == [[0, 0, 9.5, 9]]
    assert test.size(0) == (48, 64)  # from the image, where the annotation does not tell
    assert train.image(1).shape == (3, 48, 64)


def test_voc_without_lists_is_one_split(tmp_path):
    voc_tree(tmp_path, lists={})
    assert detection.splits("bccd", tmp_path) == ["all"]
    assert len(detection.load("bccd", "all", tmp_path)) == 4
    assert "has no split 'train'; expected all" in refused("bccd", "train", tmp_path)


def test_voc_that_is_broken_or_incomplete(tmp_path):
    folder = voc_tree(tmp_path)
    annotation = folder / "Annotations" / "cell_1.xml"
    for text, why in [
        ("<annotation><object>", "ParseError: "),
        (xml(("RBC", "a", 1, 2, 3)), "ValueError: "),
        (xml(("RBC", "nan", 1, 2, 3)), "ValueError: the box"),
        ("<annotation><object><bndbox/></object></annotation>", "TypeError: "),
    ]:
        annotation.write_text(text)
        assert f"{annotation} is broken or not in VOC's form ({why}" in refused("bccd", "train", tmp_path)
    annotation.unlink()
    message = refused("bccd", "train", tmp_path)
    assert message.startswith(f"1 of 2 files are missing in {folder}/Annotations, cell_1.xml among them; expected all")
    annotation.write_text(CELLS["cell_1"])
    (folder / "JPEGImages" / "cell_1.jpg").unlink()
    assert f"1 of 2 files are missing in {folder}/JPEGImages, cell_1.jpg among them" in refused(
        "bccd", "train", tmp_path
    )
    (folder / "ImageSets/Main/val.txt").write_text("\n")
    assert "val.txt names no image; expected one a line" in refused("bccd", "val", tmp_path)
    for path in (folder / "Annotations").iterdir():
        path.unlink()
    assert "Annotations holds no *.xml" in refused("bccd", "train", tmp_path)


def test_folders_that_are_no_set(tmp_path):
    message = refused("bccd", "train", tmp_path)
    assert f"{tmp_path}/bccd is missing" in message
    assert "github.com/Shenggan/BCCD_Dataset" in message
    assert "put a set there, or take one of digit_scenes, coco, bccd" in refused("mine", "train", tmp_path)
    (tmp_path / "mine").mkdir()
    assert f"{tmp_path}/mine holds 0 images and no annotations; expected JPEGImages" in refused(
        "mine", "train", tmp_path
    )
    photograph(8, 8).save(tmp_path / "mine" / "a.jpg")
    assert "mine holds 1 images and no annotations" in refused("mine", "train", tmp_path)
    for year in (2007, 2012):
        (tmp_path / "VOCdevkit" / f"VOC{year}" / "Annotations").mkdir(parents=True)
    assert "holds 2 sets; expected one; name it: VOCdevkit/VOC2007" in refused("VOCdevkit", "train", tmp_path)
    assert "bccd takes no options, got n; only digit_scenes does" in refused("bccd", "train", tmp_path, n=3)


# ------------------------------------------------------------------------------------------------ image files
GREY = np.append(np.random.default_rng(0).integers(0, 65536, 254), [0, 65535]).reshape(16, 16)  # all of 16 bits


def image_files():
    """Name -> (image, the RGB values that it stands for, as an (H, W, 3) array)."""
    grey8, colour = (GREY / 257).round().astype(np.uint8), np.array(photograph(16, 16))
    alpha = np.dstack([colour, np.full((16, 16), 9, dtype=np.uint8)])
    palette = Image.fromarray(colour).quantize(8)
    palette.info["transparency"] = bytes([0, 128] + [255] * 6)
    return {
        "grey": (Image.fromarray(grey8), grey8[..., None].repeat(3, 2)),
        "grey16": (Image.fromarray(GREY.astype(np.uint16)), grey8[..., None].repeat(3, 2)),
        "bits": (Image.fromarray(GREY > 30000), np.where(GREY > 30000, 255, 0)[..., None].repeat(3, 2)),
        "alpha": (Image.fromarray(alpha), colour),
        "palette": (palette, np.array(palette.convert("RGBA"))[..., :3]),
        "grey_alpha": (Image.fromarray(grey8).convert("LA"), grey8[..., None].repeat(3, 2)),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", image_files())
def test_every_kind_of_image_is_served_in_colour(tmp_path, name):
    image, expected = image_files()[name]
    image.save(tmp_path / "image.png")
    served = read_picture(tmp_path / "image.png", 16, 16)
    assert served.dtype == torch.uint8
    assert served.is_contiguous()
    assert np.array_equal(served.permute(1, 2, 0).numpy(), expected)


def test_sixteen_bit_tiff_and_unknown_ranges(tmp_path):
    path = tmp_path / "image.tif"
    Image.fromarray(GREY.astype(">u2")).save(path)
    assert read_picture(path, 16, 16)[0].flatten().tolist() == (GREY / 257).round().flatten().tolist()
    for values, why in (
        (GREY.astype(np.float32), "floating point"),
        (GREY.astype(np.int32) * 100, "values from 0 to 6553500"),
    ):
        Image.fromarray(values).save(path)
        with pytest.raises(UserError, match=why):
            read_picture(path, 16, 16)


def test_exif_rotation_is_not_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    photograph(64, 48).save(tmp_path / "a.jpg", exif=exif)
    photograph(64, 48).save(tmp_path / "b.jpg")
    assert torch.equal(read_picture(tmp_path / "a.jpg", 48, 64), read_picture(tmp_path / "b.jpg", 48, 64))


def test_tiny_image(tmp_path):
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "dot.png")
    assert read_picture(tmp_path / "dot.png", 1, 1, 64).flatten().tolist() == [7, 8, 9]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_an_image_cut_short_is_refused_when_it_is_read(tmp_path, progressive, share):
    root = coco_tree(tmp_path)
    path = root / "coco/val2017/000007.jpg"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    noise.save(path, progressive=progressive)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    made = detection.load("coco", "val", root)
    assert made.image(0).shape == (3, 60, 40)
    with pytest.raises(UserError) as error:
        made.image(2)
    assert str(error.value).startswith(f"{path} does not open as an image (")
    assert "\n" not in str(error.value)
    assert str(path) in refused("coco", "val", root, cache=True)


def header(width, height):
    """A PNG that promises so many pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 1000) + b"IDAT"


def test_images_that_cannot_be_served(tmp_path):
    path = tmp_path / "image.png"
    for content, why in [
        (None, "No such file"),
        (b"", "cannot identify image file"),
        (b"not an image at all", "cannot identify image file"),
        (header(16, 16), ""),
        (header(40_000, 40_000), "decompression bomb"),
    ]:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_picture(path, 16, 16)
        assert str(error.value).startswith(f"{path} does not open as an image (")
        assert why in str(error.value)
        assert "\n" not in str(error.value)
    photograph(32, 16).save(path)
    with pytest.raises(UserError, match=r"has 32 x 16 pixels, its annotation says 16 x 16; expected the same"):
        read_picture(path, 16, 16)


# ------------------------------------------------------------------------------------------------ the data step
def test_data_step(tmp_path, capsys):
    voc_tree(coco_tree(tmp_path, pixels=False))
    assert main(["coco", "--root", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (
        "coco val: 3 images, 3 boxes, 3 classes (toothbrush, car, dog), passed over: 1 x box without area, 1 x box"
        in printed
    )
    assert main(["bccd", "--root", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", passed")[0] for line in lines] == [
        "bccd train: 2 images, 3 boxes, 3 classes (Platelets, RBC, WBC)",
        "bccd val: 1 images, 0 boxes, 3 classes (Platelets, RBC, WBC)",
        "bccd test: 1 images, 1 boxes, 3 classes (Platelets, RBC, WBC)",
    ]
    for name in ("bccd", "coco"):
        datasets.prepare(name, tmp_path)
        assert detection.is_set(name, tmp_path)
        with pytest.raises(
            UserError, match=f"{name} is a set with boxes; .*open it with common.datasets.detection.load"
        ):
            datasets.load(name, "train", tmp_path)
        with pytest.raises(UserError, match=f"{tmp_path / 'none' / name} is missing; .*https://"):
            datasets.prepare(name, tmp_path / "none")
        assert main([name, "--root", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert not detection.is_set("cifar10", tmp_path)
    assert main(["mine", "--root", str(tmp_path)]) == 2
    assert "unknown dataset 'mine'" in capsys.readouterr().err
