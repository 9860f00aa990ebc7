"""Where the networks are cut into K modules: the paper's tables, and a rule for networks that it has none for."""

from .model import Cut, ResNet

# (stage, block) after which to cut, of the official code (networks/configs.py). Equal numbers of layers a module.
EQUAL_LAYERS = {
    ("r32", 2): ((2, 1),),
    ("r32", 3): ((1, 4), (2, 4)),
    ("r32", 4): ((1, 2), (2, 1), (3, 0)),
    ("r32", 8): ((1, 0), (1, 2), (1, 4), (2, 1), (2, 3), (3, 0), (3, 2)),
    ("r32", 16): ((0, 0), *((s, b) for s in (1, 2, 3) for b in range(5) if (s, b) != (3, 4))),
    ("r110", 2): ((2, 8),),
    ("r110", 3): ((1, 17), (2, 17)),
    ("r110", 4): ((1, 11), (2, 7), (3, 3)),
    ("r110", 8): ((1, 4), (1, 11), (2, 0), (2, 7), (2, 14), (3, 3), (3, 10)),
    ("r110", 16): (
        *((1, b) for b in (1, 4, 7, 10, 13, 16)),
        *((2, b) for b in (1, 4, 7, 11, 15)),
        *((3, b) for b in (1, 5, 9, 13)),
    ),
    ("resnet101", 2): ((2, 0),),
    ("resnet152", 2): ((2, 5),),
    ("resnext101_32x8d", 2): ((2, 2),),
}
# InfoPro*: equal memory a module. On ImageNet the paper has no other cuts.
EQUAL_MEMORY = {
    ("r110", 2): ((1, 14),),
    ("r110", 3): ((1, 9), (2, 2)),
    ("r110", 4): ((1, 6), (1, 14), (2, 8)),
    **{key: cuts for key, cuts in EQUAL_LAYERS.items() if key[0].startswith("res")},
}
STL_EQUAL_MEMORY_K3 = ((1, 8), (2, 1))  # of R-110 on 96x96 images; K = 2 and 4 as on CIFAR


def cut_points(name: str, network: ResNet, K: int, equal_memory: bool = False) -> tuple[Cut, ...]:
    """K - 1 cuts of a network: the paper's, or as equal numbers of blocks (and stem) as there can be.

    ValueError: K below 1 or above the number of units, or equal memory without a table.
    """
    blocks = [(0, 0), *((s, b) for s, stage in enumerate(network.stages, 1) for b in range(len(stage)))]
    if not 1 <= K <= len(blocks):
        raise ValueError(f"K={K} modules of {name}; it has {len(blocks) - 1} blocks and a stem: 1 to {len(blocks)}")
    if K == 1:
        return ()
    table = EQUAL_MEMORY if equal_memory else EQUAL_LAYERS
    if (name, K) in table:
        return table[name, K]
    if equal_memory or any(known == name for known, _ in table):
        known = ", ".join(f"{n} K={k}" for n, k in table)
        raise ValueError(
            f"no cuts of {name} for K={K}{' and equal memory' * equal_memory}; the paper has {known}; give cuts"
        )
    return tuple(blocks[round(k * len(blocks) / K) - 1] for k in range(1, K))
