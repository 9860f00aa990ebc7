"""The embedded set: scikit-learn's 1,797 handwritten digits, always there, no download.

Source: the test part of UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, CC BY 4.0), real
8x8 grey images that come inside the scikit-learn package. `cluttered_digits` and others derive harder tasks from it.
"""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits

from common.datasets.images import Images, fingerprint
from common.runtime import keyed_order

TEST_PER_CLASS = 40
MEAN, STD = (0.3057,), (0.3763,)  # of the train split


@cache
def load(split: str) -> Images:
    """1,397 training or 400 test images (exactly 40 of each class), (N, 8, 8, 1) uint8, ink = 255 on 0.

    The split is fixed: the samples are put in one keyed order and the last 40 of each class are the test set.
    """
    source = load_digits()
    order = keyed_order(len(source.target), 0, 0).numpy()
    labels = source.target[order].astype(np.int64)
    test = np.sort(np.concatenate([np.flatnonzero(labels == c)[-TEST_PER_CLASS:] for c in range(10)]))
    chosen = test if split == "test" else np.setdiff1d(np.arange(len(labels)), test)
    images = np.floor(source.images[order[chosen]] * 255 / 16 + 0.5).astype(np.uint8)[..., None]
    images, labels = torch.from_numpy(images), torch.from_numpy(labels[chosen])
    return Images("digits", split, images, labels, 10, MEAN, STD, fingerprint(images, labels))
