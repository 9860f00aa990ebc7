"""Settings of the ways to train: baselines, and the lambdas that the authors chose for each data set, network and K."""

END_TO_END = {"modules": 1}
GREEDY = {"loss": "softmax", "head": "0c1f", "lambda1": (0, 0), "lambda2": (1, 1)}  # greedy supervised learning
DGL = {"loss": "softmax", "head": "1c2f", "lambda1": (0, 0), "lambda2": (1, 1)}  # the head of InfoPro, and no decoder

# (data set, network, K): lambda1 at module 1 and K - 1, lambda2 likewise; "*": equal memory. Official file comand.sh.
LAMBDAS = {
    ("cifar10", "r32", 2): ((5, 5), (1, 1)),
    ("cifar10", "r32", 4): ((6, 1), (0, 2)),
    ("cifar10", "r32", 8): ((5, 0), (0, 2)),
    ("cifar10", "r32", 16): ((5, 0.2), (0.05, 0.5)),
    ("cifar10", "r110", 2): ((5, 5), (0.5, 0.5)),
    ("cifar10", "r110", 4): ((1, 0), (0, 1)),
    ("cifar10", "r110", 8): ((5, 0), (0, 1)),
    ("cifar10", "r110", 16): ((5, 0.5), (0, 1)),
    ("cifar10", "r110*", 2): ((5, 5), (0.1, 0.1)),
    ("cifar10", "r110*", 3): ((5, 5), (0, 0.1)),
    ("cifar10", "r110*", 4): ((5, 5), (0, 0.1)),
    ("stl10", "r110", 2): ((10, 10), (1, 1)),
    ("stl10", "r110", 4): ((20, 5), (0.2, 2)),
    ("stl10", "r110", 8): ((20, 5), (0.2, 1)),
    ("stl10", "r110", 16): ((20, 10), (0.5, 0.1)),
    ("stl10", "r110*", 2): ((20, 20), (1, 1)),
    ("stl10", "r110*", 3): ((20, 5), (0.5, 2)),
    ("stl10", "r110*", 4): ((20, 10), (0.5, 1)),
    ("svhn", "r110", 2): ((1, 1), (0.1, 0.1)),
    ("svhn", "r110", 4): ((5, 0.5), (0, 1)),
    ("svhn", "r110", 8): ((5, 0.5), (0, 2)),
    ("svhn", "r110", 16): ((5, 0.5), (0.2, 1)),
}


def contrast(dataset: str, name: str, K: int) -> dict:
    """InfoPro with the contrastive loss."""
    lambda1, lambda2 = LAMBDAS[dataset, name, K]
    return {"loss": "contrast", "head": "1c2f", "lambda1": lambda1, "lambda2": lambda2}


def softmax(dataset: str, name: str, K: int) -> dict:
    """InfoPro with cross-entropy. Its lambdas are published nowhere: those of the contrastive form stand in for them."""
    return {**contrast(dataset, name, K), "loss": "softmax"}
