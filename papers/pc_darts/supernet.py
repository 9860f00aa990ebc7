"""The weight-sharing network of the search (official file: model_search.py / model_search_imagenet.py)."""

import torch
from torch import Tensor, nn

from .genotypes import EDGES, PRIMITIVES, Genotype, derive, edge_weights
from .model import imagenet_stem
from .reference import PlainCell
from .shared import SharedCell

ARCHITECTURE = ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce")


class SuperNet(nn.Module):
    """All cells of the search space at once: images (N, 3, H, W) -> logits (N, num_classes).

    Paper: C=16, layers=8, with K=4 and the CIFAR stem, or K=2 and the ImageNet stem. K=1, edge_norm=False is DARTS.
    H and W are multiples of 4 (CIFAR, from 8 up) or 32 (ImageNet).

    cell: "shared" does shared work once, "plain" is the definition; same function, same gradients.

    The architecture is four buffers: no weight optimiser or decay sees it, yet it moves with `.to(device)` and is in
    every state_dict: alphas_normal, alphas_reduce (14, 8), betas_normal, betas_reduce (14,), drawn from 1e-3 * N(0, 1).
    """

    def __init__(
        self,
        C: int = 16,
        num_classes: int = 10,
        layers: int = 8,
        K: int = 4,
        stem: str = "cifar",
        edge_norm: bool = True,
        cell: str = "shared",
    ):
        super().__init__()
        if K < 1 or C < 1 or C % K or C // K % 2:
            raise ValueError(f"C={C}, K={K}: expected C/K to be a whole, even number of channels")
        if layers < 1 or num_classes < 1:
            raise ValueError(f"layers={layers}, num_classes={num_classes}: expected at least 1")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"unknown stem {stem!r}, expected 'cifar' or 'imagenet'")
        if cell not in ("shared", "plain"):
            raise ValueError(f"unknown cell {cell!r}, expected 'shared' or 'plain'")
        self.edge_norm, self.shared = edge_norm, cell == "shared"
        self.size_multiple = 4 if stem == "cifar" else 32
        width = 3 * C
        if stem == "cifar":
            self.stem0 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
            self.stem1 = None
        else:
            self.stem0, self.stem1 = imagenet_stem(width)
        make = SharedCell if self.shared else PlainCell
        self.cells, self.is_reduction = nn.ModuleList(), []
        c_pp = c_p = width
        reduction_prev = stem == "imagenet"
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            C *= 2 if reduction else 1
            self.cells.append(make(c_pp, c_p, C, K, reduction, reduction_prev))
            self.is_reduction.append(int(reduction))  # an index: torch.compile refuses bool
            reduction_prev = reduction
            c_pp, c_p = c_p, 4 * C
        self.classifier = nn.Linear(c_p, num_classes)
        for name in ARCHITECTURE:
            shape = (len(EDGES), len(PRIMITIVES)) if name.startswith("alphas") else (len(EDGES),)
            self.register_buffer(name, (1e-3 * torch.randn(shape)).requires_grad_())

    def arch_parameters(self) -> list[Tensor]:
        """[alphas_normal, alphas_reduce, betas_normal, betas_reduce]; without edge normalisation only the alphas."""
        alphas = [self.alphas_normal, self.alphas_reduce]
        return [*alphas, self.betas_normal, self.betas_reduce] if self.edge_norm else alphas

    def _apply(self, fn, recurse: bool = True):
        # `.to()` would put results of an operation in place of these leaves; an optimiser must keep finding them.
        arch = {name: self._buffers.pop(name) for name in ARCHITECTURE}
        super()._apply(fn, recurse)
        for name, tensor in arch.items():
            tensor.data = fn(tensor.data)
            self._buffers[name] = tensor
        return self

    def genotype(self) -> Genotype:
        """The two cells that alphas and betas stand for now."""
        return derive(*self.arch_parameters())

    def forward(self, x: Tensor) -> Tensor:
        m = self.size_multiple
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] % m or x.shape[3] % m:
            raise ValueError(f"images of shape {tuple(x.shape)}, expected (N, 3, H, W) with H and W divisible by {m}")
        alphas = [self.alphas_normal.softmax(-1), self.alphas_reduce.softmax(-1)]
        betas = [edge_weights(b) if self.edge_norm else None for b in (self.betas_normal, self.betas_reduce)]
        # Shared cells read rectified maps: each is rectified in place, once, and kept once for the two cells reading it.
        rectify = torch.relu_ if self.shared else nn.Identity()
        s0 = rectify(self.stem0(x))
        s1 = s0 if self.stem1 is None else rectify(self.stem1(s0))
        for i, (cell, reduction) in enumerate(zip(self.cells, self.is_reduction, strict=True)):
            out = cell(s0, s1, alphas[reduction], betas[reduction])
            s0, s1 = s1, out if i == len(self.cells) - 1 else rectify(out)
        return self.classifier(s1.mean((2, 3)))

    def load_plain(self, plain: "SuperNet") -> None:
        """Copy weights, running statistics and architecture of a cell="plain" network of the same shape."""
        for mine, theirs in zip(self.children(), plain.children(), strict=True):
            if mine is not self.cells:
                mine.load_state_dict(theirs.state_dict())
        for mine, theirs in zip(self.cells, plain.cells, strict=True):
            mine.load_plain(theirs)
        with torch.no_grad():
            for name in ARCHITECTURE:
                getattr(self, name).copy_(getattr(plain, name))


def supernet_weights(C: int = 16, K: int = 4, layers: int = 8, num_classes: int = 10) -> int:
    """Number of weights of the CIFAR supernet in closed form.

    Stem 27 * 3C + 6C; a cell C_pp * C + C_p * C + 14 (6 c^2 + 102 c) with c = C/K, plus 8 c^2 if it reduces.
    """
    total = 27 * 3 * C + 6 * C
    c_pp = c_p = 3 * C
    for i in range(layers):
        reduction = i in (layers // 3, 2 * layers // 3)
        C *= 2 if reduction else 1
        c = C // K
        total += (c_pp + c_p) * C + 14 * (6 * c * c + 102 * c) + (8 * c * c if reduction else 0)
        c_pp, c_p = c_p, 4 * C
    return total + c_p * num_classes + num_classes
