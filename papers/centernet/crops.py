"""Training samples from a set of images with boxes: a crop, its boxes, and what colour will do to it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.datasets.detection import DetectionSet
from common.errors import UserError

from .augment import clip, colour_draw, mirror, random_crop

MOST = 128  # objects of a sample; further ones are left out
NO_COLOUR = torch.tensor([1.0, 0, 0, 0, 0, 0])


class Crops(Dataset):
    """Sample i: {image (3, side, side) uint8, boxes (MOST, 4), labels (MOST,), count, colour (6,), unreadable}.

    Its randomness is that of torch's default generator. An image that does not open is told of in one line and replaced by
    the next that does; `unreadable` counts those passed over, so that the training loop can show how many there were.
    """

    def __init__(self, images: DetectionSet, side: int, scales: Sequence[float], border: int, flip: bool, colour: bool):
        self.images, self.side, self.scales, self.border = images, side, scales, border
        self.flip, self.colour = flip, colour

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        image, i, unreadable = self._read(i)
        truth = self.images.truth(i)
        image, boxes = random_crop(image, truth.boxes, self.side, self.scales, self.border)
        boxes, there = clip(boxes, self.side)
        boxes, labels = boxes[there][:MOST], truth.labels[there][:MOST]
        if self.flip and torch.rand(()) > 0.5:
            image, boxes = mirror(image, boxes)
        sample = {"image": image, "boxes": torch.zeros(MOST, 4), "labels": torch.zeros(MOST, dtype=torch.int64)}
        sample["boxes"][: len(boxes)], sample["labels"][: len(boxes)] = boxes, labels
        colour = colour_draw() if self.colour else NO_COLOUR
        return sample | {
            "count": torch.tensor(len(boxes)),
            "colour": colour,
            "unreadable": torch.tensor(unreadable),
        }

    def _read(self, i: int) -> tuple[Tensor, int, int]:
        for unreadable in range(len(self.images)):
            try:
                return self.images.image(i), i, unreadable
            except UserError as error:
                print(f"passed over: {error}", flush=True)
                i = (i + 1) % len(self.images)
        raise UserError(f"no image of {self.images.name} {self.images.split} opens; unpack the set again")
