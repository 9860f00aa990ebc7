"""PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search (Xu et al., ICLR 2020)."""

from .genotypes import PRIMITIVES, PUBLISHED, Genotype, derive, random_genotype, space_size
from .model import NetworkCIFAR, NetworkImageNet
from .supernet import SuperNet, supernet_weights

__all__ = [
    "PRIMITIVES",
    "PUBLISHED",
    "Genotype",
    "NetworkCIFAR",
    "NetworkImageNet",
    "SuperNet",
    "derive",
    "random_genotype",
    "space_size",
    "supernet_weights",
]
