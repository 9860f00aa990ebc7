"""CMC and mean average precision of person re-identification, from descriptors or from a matrix of distances.

For a query of identity y and camera c the gallery is

    junk         identity -1 (bad boxes), or y on the same camera c: removed before ranking, neither hit nor miss
    good         identity y on another camera: the hits
    the others   misses; the distractors of identity 0 are among them, so keep them in the gallery

and what is left after removing junk is ranked by distance, equal distances in the order of the gallery. CMC at k: the share of
queries with a hit among the first k. A query without any good image has neither: it is skipped, and counted as skipped.

Average precision has two conventions; they differ by some tenths of a point, so say which one a number is:

    A, rectangle   mean over the hits of the precision at the hit (deep-person-reid and most libraries)
    B, trapezoid   mean over the hits of the mean of the precisions at and before the hit (Market-1501's Matlab code)

With hit i (from 0) at rank r_i (from 0): A adds (i + 1)/(r_i + 1), B adds half of that and half of i/r_i, which is 1 for r_i = 0.
B <= A always.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError

JUNK = -1
CHUNK = 2**20  # distances in work at once: some tens of MB, whatever the sizes


@dataclass(frozen=True)
class Retrieval:
    """The outcome of every query. A skipped one (no good image) has first = -1 and NaN for both precisions.

    first: (Q,) int64, rank from 0 of the first hit. ap_a, ap_b: (Q,) float64 in 0..1.
    """

    first: Tensor
    ap_a: Tensor
    ap_b: Tensor

    @property
    def valid(self) -> Tensor:
        """(Q,) bool: the queries that have a good image."""
        return self.first >= 0

    @property
    def skipped(self) -> int:
        return int((~self.valid).sum())

    @property
    def map_a(self) -> float:
        """Mean average precision in percent, convention A (rectangle)."""
        return 100 * self.ap_a[self.valid].mean().item()

    @property
    def map_b(self) -> float:
        """Mean average precision in percent, convention B (trapezoid)."""
        return 100 * self.ap_b[self.valid].mean().item()

    def cmc(self, k: int) -> float:
        """Share in percent of the valid queries with a hit among the first k >= 1."""
        if k < 1:
            raise UserError(f"CMC at rank {k}; expected k >= 1")
        return 100 * (self.first[self.valid] < k).double().mean().item()


def evaluate(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    query_cameras: Tensor,
    gallery_ids: Tensor,
    gallery_cameras: Tensor,
) -> Retrieval:
    """Rank the gallery (G, d) for each query (Q, d) by Euclidean distance; identities and cameras (Q,) and (G,) int64.

    The matrix of distances is never whole in memory. UserError for shapes that do not fit, descriptors that are not
    finite, a junk image (-1) as query, and when no query has a good image.
    """
    labels = _checked(len(query), len(gallery), query_ids, query_cameras, gallery_ids, gallery_cameras)
    if query.ndim != 2 or gallery.ndim != 2 or query.shape[1] != gallery.shape[1]:
        raise UserError(
            f"descriptors {tuple(query.shape)} and {tuple(gallery.shape)}; expected (Q, d) and (G, d): flatten first"
        )
    if not (query.isfinite().all() and gallery.isfinite().all()):
        raise UserError("a descriptor is not finite; did the training diverge?")
    return _score(_distances(query, gallery), labels)


def evaluate_distances(
    distances: Tensor, query_ids: Tensor, query_cameras: Tensor, gallery_ids: Tensor, gallery_cameras: Tensor
) -> Retrieval:
    """The same from distances (Q, G) of any kind, smaller is closer; errors as in `evaluate`."""
    labels = _checked(*distances.shape, query_ids, query_cameras, gallery_ids, gallery_cameras)
    if not distances.isfinite().all():
        raise UserError("a distance is not finite; did the training diverge?")
    return _score(distances.split(_rows(distances.shape[1])), labels)


def top(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    query_cameras: Tensor,
    gallery_ids: Tensor,
    gallery_cameras: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    """The first k gallery images of each query after removing junk: (Q, k) indices, -1 where fewer are left; (Q, k) bool hits."""
    labels = _checked(len(query), len(gallery), query_ids, query_cameras, gallery_ids, gallery_cameras)
    found = []
    for distances, _, _ in _cleaned(_distances(query, gallery), labels):
        nearest, order = distances.sort(dim=1, stable=True)  # junk is at the end
        found.append(order[:, :k].masked_fill(nearest[:, :k].isinf(), -1))
    order = torch.cat(found)
    return order, (order >= 0) & (gallery_ids[order] == query_ids[:, None])


def _rows(gallery: int) -> int:
    """How many rows of distances are in work at once."""
    return max(1, CHUNK // max(gallery, 1))


def _distances(query: Tensor, gallery: Tensor) -> Iterator[Tensor]:
    """Chunks (q, G) of the squared Euclidean distances, less the |query|^2 that all of a row share: the order is the same."""
    squares = gallery.square().sum(1)
    for rows in query.split(_rows(len(gallery))):
        yield torch.addmm(squares, rows, gallery.T, alpha=-2)


def _cleaned(chunks, labels: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For every chunk of queries: distances (q, G), infinite for junk; the good images as pairs (row, image), (J,) each."""
    query_ids, query_cameras, gallery_ids, gallery_cameras = labels
    bad_boxes = torch.zeros(len(gallery_ids), device=gallery_ids.device).masked_fill(gallery_ids == JUNK, torch.inf)
    start = 0
    for distances in chunks:
        ids, cameras = (t[start : start + len(distances)] for t in (query_ids, query_cameras))
        row, at = (ids[:, None] == gallery_ids).nonzero(as_tuple=True)
        junk = cameras[row] == gallery_cameras[at]
        distances = distances + bad_boxes
        distances[row[junk], at[junk]] = torch.inf
        yield distances, row[~junk], at[~junk]
        start += len(distances)


def _ranks(distances: Tensor, row: Tensor, at: Tensor) -> Tensor:
    """Rank from 0 of image at[j] in row row[j], (J,) int64: how many are nearer, or as near and before it in the gallery.

    Counting is exact and needs no sorting of the rows: there are few hits, 17 a query in Market-1501.
    """
    ranks = []
    for pair, image in zip(row.split(_rows(distances.shape[1])), at.split(_rows(distances.shape[1])), strict=True):
        others = distances[pair]
        own = others.gather(1, image[:, None])
        nearer, equal = _count(others < own), others == own
        tied = (_count(equal) > 1).nonzero()[:, 0]
        before = torch.arange(distances.shape[1], device=distances.device) < image[tied, None]
        nearer[tied] += _count(equal[tied] & before)
        ranks.append(nearer)
    return torch.cat(ranks).long() if ranks else row


def _count(mask: Tensor) -> Tensor:
    """True values of each row; on the CPU ten times as fast as mask.sum(1)."""
    return mask.view(torch.uint8).sum(1, dtype=torch.int32)


def _score(chunks, labels: tuple[Tensor, ...]) -> Retrieval:
    found = []
    for distances, row, at in _cleaned(chunks, labels):
        rank, order = (row * distances.shape[1] + _ranks(distances, row, at)).sort()  # row by row, nearest first
        rank, row = rank % distances.shape[1], row[order]
        hits = row.bincount(minlength=len(distances))
        number = torch.arange(len(row), device=row.device) - (hits.cumsum(0) - hits)[row]  # i
        first = torch.full_like(hits, -1)
        first[row[number == 0]] = rank[number == 0]
        precision = (number + 1).double() / (rank + 1)
        before = torch.where(rank > 0, number.double() / rank, 1.0)
        sums = torch.zeros(2, len(hits), dtype=torch.float64, device=row.device)
        sums[0].index_add_(0, row, precision)
        sums[1].index_add_(0, row, (before + precision) / 2)
        found.append((first, *(sums / hits)))  # 0/0: NaN for a query without a good image
    result = Retrieval(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    if not result.valid.any():
        raise UserError("no query has an image of its identity on another camera in the gallery; check ids and cameras")
    return result


def _checked(queries: int, images: int, query_ids, query_cameras, gallery_ids, gallery_cameras) -> tuple[Tensor, ...]:
    shapes = [tuple(t.shape) for t in (query_ids, query_cameras, gallery_ids, gallery_cameras)]
    if shapes != [(queries,), (queries,), (images,), (images,)] or not queries or not images:
        raise UserError(
            f"{queries} queries and {images} gallery images with ids and cameras of shapes {shapes}; expected at least "
            "one of each, and an id and a camera for each"
        )
    if (query_ids == JUNK).any():
        raise UserError(f"query {int((query_ids == JUNK).nonzero()[0])} has identity -1, which is junk; leave it out")
    return query_ids, query_cameras, gallery_ids, gallery_cameras
