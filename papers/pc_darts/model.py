"""Evaluation networks: the discrete cells stacked and trained from scratch (official file: model.py)."""

import torch
from torch import Tensor, nn

from .genotypes import Genotype
from .operations import FactorizedReduce, ReLUConvBN, drop_path, operation


class Cell(nn.Module):
    """One discrete cell: (N, c_pp, H', W'), (N, c_p, H, W) -> (N, 4c, H/s, W/s), s = 2 in a reduction cell."""

    def __init__(self, genotype: Genotype, c_pp: int, c_p: int, c: int, reduction: bool, reduction_prev: bool):
        super().__init__()
        self.preprocess0 = FactorizedReduce(c_pp, c) if reduction_prev else ReLUConvBN(c_pp, c)
        self.preprocess1 = ReLUConvBN(c_p, c)
        edges, self.concat = genotype[2:] if reduction else genotype[:2]
        self.sources = tuple(source for _, source in edges)
        self.ops = nn.ModuleList(operation(op, c, 2 if reduction and s < 2 else 1) for op, s in edges)

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float = 0.0) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for n in range(0, len(self.ops), 2):
            states.append(sum(self._edge(e, states, drop_path_prob) for e in (n, n + 1)))
        return torch.cat([states[i] for i in self.concat], dim=1)

    def _edge(self, e: int, states: list[Tensor], drop_path_prob: float) -> Tensor:
        out = self.ops[e](states[self.sources[e]])
        if self.training and drop_path_prob > 0 and not isinstance(self.ops[e], nn.Identity):
            out = drop_path(out, drop_path_prob)
        return out


class AuxiliaryHead(nn.Sequential):
    """Classifier on the features after the second reduction, for training. (N, c, 8, 8) or (N, c, 7, 7) -> logits.

    CIFAR: pool stride 3 and a second BN. ImageNet: pool stride 2 and, as in the official code, no second BN.
    """

    def __init__(self, c: int, num_classes: int, imagenet: bool = False):
        super().__init__(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=2 if imagenet else 3, padding=0, count_include_pad=False),  # -> 2x2
            nn.Conv2d(c, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            *([] if imagenet else [nn.BatchNorm2d(768)]),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(768, num_classes),
        )


class _Network(nn.Module):
    """Cells after a stem that returns the two inputs of cell 0."""

    def __init__(self, c, num_classes, layers, genotype, auxiliary, widths, imagenet):
        super().__init__()
        if c < 2 or c % 2 or layers < 1 or num_classes < 1:
            raise ValueError(
                f"C={c}, layers={layers}, num_classes={num_classes}: expected C even, the others at least 1"
            )
        genotype.validate()
        self.drop_path_prob = 0.0  # set by the training loop: grows linearly over the epochs
        c_pp, c_p = widths
        self.cells = nn.ModuleList()
        self.auxiliary_at, self.auxiliary = 2 * layers // 3, None
        reduction_prev = imagenet
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            c *= 2 if reduction else 1
            cell = Cell(genotype, c_pp, c_p, c, reduction, reduction_prev)
            self.cells.append(cell)
            reduction_prev = reduction
            c_pp, c_p = c_p, len(cell.concat) * c
            if i == self.auxiliary_at and auxiliary:
                self.auxiliary = AuxiliaryHead(c_p, num_classes, imagenet)
        self.classifier = nn.Linear(c_p, num_classes)

    def stem(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (N, 3, H, W) -> (logits (N, classes), auxiliary logits while training with the head, else None)."""
        s0, s1 = self.stem(x)
        logits_aux = None
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if i == self.auxiliary_at and self.auxiliary is not None and self.training:
                logits_aux = self.auxiliary(s1)
        return self.classifier(s1.mean((2, 3))), logits_aux


class NetworkCIFAR(_Network):
    """Paper: C=36, layers=20. H and W divisible by 4; with the auxiliary head 32x32 (the head needs 8x8 features)."""

    def __init__(
        self,
        genotype: Genotype,
        C: int = 36,
        num_classes: int = 10,
        layers: int = 20,
        auxiliary: bool = False,
    ):
        super().__init__(C, num_classes, layers, genotype, auxiliary, (3 * C, 3 * C), imagenet=False)
        self.stem0 = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))

    def stem(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"images of {x.shape[2]}x{x.shape[3]}, expected height and width divisible by 4")
        s = self.stem0(x)
        return s, s


class NetworkImageNet(_Network):
    """Paper: C=48, layers=14, 224x224. H and W divisible by 32; the auxiliary head needs 224x224."""

    def __init__(
        self,
        genotype: Genotype,
        C: int = 48,
        num_classes: int = 1000,
        layers: int = 14,
        auxiliary: bool = False,
    ):
        super().__init__(C, num_classes, layers, genotype, auxiliary, (C, C), imagenet=True)
        self.stem0, self.stem1 = imagenet_stem(C)

    def stem(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[2] % 32 or x.shape[3] % 32:
            raise ValueError(f"images of {x.shape[2]}x{x.shape[3]}, expected height and width divisible by 32")
        s0 = self.stem0(x)
        return s0, self.stem1(s0)


def imagenet_stem(width: int) -> tuple[nn.Sequential, nn.Sequential]:
    """(N, 3, H, W) -> (N, width, H/4, W/4) and, from there, -> (N, width, H/8, W/8)."""
    if width % 2:
        raise ValueError(f"ImageNet stem of width {width}, expected an even number")

    def conv(c_in: int, c_out: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out)]

    stem0 = nn.Sequential(*conv(3, width // 2), nn.ReLU(), *conv(width // 2, width))
    return stem0, nn.Sequential(nn.ReLU(), *conv(width, width))
