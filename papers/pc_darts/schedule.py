"""Learning rate of an epoch. Cosine: both searches and CIFAR training; linear: ImageNet training."""

import math


def learning_rate(config, epoch: int) -> float:
    """`config.lr` falling to `config.lr_min` over `config.epochs`, after `config.lr_warmup` epochs of linear rise.

    Cosine (a config without `schedule`, or "cosine"): lr_min + (lr - lr_min)(1 + cos(pi epoch/epochs)) / 2.
    Linear (official train_imagenet.py, adjust_lr): lr (epochs - 5 - epoch) / (epochs - 5), and a five times smaller slope
    in the last 5 epochs.
    Warm-up (official): epoch e < lr_warmup takes lr (e + 1) / lr_warmup.
    """
    if epoch < config.lr_warmup:
        return config.lr * (epoch + 1) / config.lr_warmup
    if getattr(config, "schedule", "cosine") == "linear":
        tail = min(5, config.epochs - 1)
        left, main = config.epochs - epoch, config.epochs - tail
        return config.lr * ((left - tail) / main if left > tail else left / (main * 5))
    return config.lr_min + 0.5 * (config.lr - config.lr_min) * (1 + math.cos(math.pi * epoch / config.epochs))
