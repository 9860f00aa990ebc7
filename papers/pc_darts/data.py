"""What a search reads: one part of the training set for the weights, another for {alpha, beta}."""

from torch.utils.data import Subset

from common.datasets import imagenet
from common.datasets.classification import device_loader, files_loader, imagenet_transform, small_set
from common.runtime import keyed_order


def search_loaders(config, job) -> tuple:
    """(weights' loader, architecture's loader, the latter's images in order, classes, images of both, data digests).

    The training set is cut in two by a permutation that is a pure function of the seed. ImageNet: the first two disjoint
    fractions `config.fractions` of every class.
    """
    if config.dataset == "imagenet":
        transforms = (imagenet_transform(train, config.image_size or 224) for train in (True, False))
        folder, plain = (imagenet.image_folder("train", job.data, transform) for transform in transforms)
        first, second = imagenet.class_fraction_split(folder.targets, config.fractions, job.seed)
        weights = files_loader(Subset(folder, first), config, job, True)
        architecture = files_loader(Subset(folder, second), config, job, True, job.seed + 1)
        held_out = files_loader(Subset(plain, second), config, job, False)
        classes, images, digests = len(folder.classes), len(first) + len(second), {"imagenet": f"{len(folder)} files"}
        return weights, architecture, held_out, classes, images, digests
    images = small_set(config, job, "train")
    first, second = (images.subset(half) for half in keyed_order(len(images), job.seed, -1).split(-(-len(images) // 2)))
    weights = device_loader(first, config, job, True)
    architecture = device_loader(second, config, job, True, job.seed + 1)
    held_out = device_loader(second, config, job, False)
    return weights, architecture, held_out, images.classes, len(images), {images.name: images.digest}
