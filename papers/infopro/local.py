"""Gradient-isolated local modules: InfoPro, and with other losses greedy supervised learning and DGL (sections 3 and 4).

model = InfoPro(network, cuts, decoder=Decoder, head=lambda c: head("1c2f", c, 128), lambda1=(5, 5), lambda2=(0, 0.1))
losses, _ = model.backward(images, pixels, labels)  # every module's gradients; then one optimiser step over all
logits = model(images)  # the network alone, which no cut has changed
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import contrastive_loss, interpolated, reconstruction_loss
from .model import Cut, ResNet, initialise, width

LOSSES = {"contrast": contrastive_loss, "softmax": F.cross_entropy}


class InfoPro(nn.Module):
    """A network in K modules. Module k < K has the loss lambda1_k BCE(decoder) + lambda2_k task(head); the last one, CE.

    cuts: K - 1 times (stage, block), in their order; none: K = 1, end to end.
    decoder, head: make an auxiliary net for a number of channels. Where a lambda is 0 there is none: nothing is computed
        only to be multiplied by 0.
    lambda1, lambda2: of module 1 and of module K - 1, linear between the two.
    loss: what the head is trained with, "contrast" or "softmax".
    ValueError: cuts that are not there or not in order, a negative lambda, an unknown loss.
    """

    def __init__(
        self,
        network: ResNet,
        cuts: Sequence[Cut] = (),
        decoder: Callable[[int], nn.Module] | None = None,
        head: Callable[[int], nn.Module] | None = None,
        lambda1: tuple[float, float] = (0, 0),
        lambda2: tuple[float, float] = (1, 1),
        loss: str = "softmax",
    ):
        super().__init__()
        ends = [network.units_before(cut) for cut in cuts]
        if ends != sorted(set(ends)):
            raise ValueError(f"cuts {[tuple(cut) for cut in cuts]}, expected rising (stage, block), each once")
        if loss not in LOSSES:
            raise ValueError(f"unknown loss {loss!r}; expected {' or '.join(LOSSES)}")
        if min(*lambda1, *lambda2) < 0:
            raise ValueError(f"lambda1={lambda1}, lambda2={lambda2}: expected 0 or more")
        self.network, self.loss, self.K = network, loss, len(cuts) + 1
        self.bounds = [0, *ends, len(network.units)]  # module k has units bounds[k] .. bounds[k + 1] - 1
        self.lambda1, self.lambda2 = interpolated(*lambda1, len(cuts)), interpolated(*lambda2, len(cuts))
        channels = [width(network.units[end - 1]) for end in ends]

        def nets(make: Callable[[int], nn.Module] | None, weights: list[float]) -> nn.ModuleDict:
            """{"k": net}, k from 0."""
            return nn.ModuleDict({str(k): initialise(make(c)) for k, c in enumerate(channels) if weights[k]})

        # After the network, so that one seed gives it the same weights for every K.
        self.decoders, self.heads = nets(decoder, self.lambda1), nets(head, self.lambda2)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def module_parameters(self, k: int) -> list[nn.Parameter]:
        """Of module k, from 0, with its auxiliary nets: what its loss trains."""
        nets = self.network.units[self.bounds[k] : self.bounds[k + 1]]
        nets += [group[str(k)] for group in (self.decoders, self.heads) if str(k) in group]
        return [p for net in nets for p in net.parameters()]

    def local_loss(self, k: int, x: Tensor, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Module k (from 0) on the module before's output, or on images: (its own output h, detached, and its loss).

        pixels (B, 3, H, W) in [0, 1]: the images to reconstruct; labels (B,). Of the last module h is the logits.
        """
        h = self.network.run(x, self.bounds[k], self.bounds[k + 1])
        if k == self.K - 1:
            return h.detach(), F.cross_entropy(h, labels)
        loss = h.new_zeros(())
        if self.lambda1[k]:
            loss = self.lambda1[k] * reconstruction_loss(self.decoders[str(k)](h, pixels.shape[-2:]), pixels)
        if self.lambda2[k]:
            loss = loss + self.lambda2[k] * LOSSES[self.loss](self.heads[str(k)](h), labels)
        return h.detach(), loss

    def backward(
        self, x: Tensor, pixels: Tensor, labels: Tensor, amp: bool = False, modules: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Simultaneous training: adds every module's gradient to .grad. Returns the K losses (K,) and the logits, detached.

        The backward pass of a module runs, and frees its graph, before the next module starts: at no time is there more
        than one module's graph. amp: bfloat16 autocast.
        modules: some in a row alone, such as range(1, 3); x is then what comes before them, and for the logits comes what
        they put out.
        """
        losses = []
        for k in range(self.K) if modules is None else modules:
            with torch.autocast("cuda" if x.is_cuda else "cpu", torch.bfloat16, enabled=amp):  # "meta" has none
                x, loss = self.local_loss(k, x, pixels, labels)
            if loss.requires_grad:  # not where both lambdas are 0
                loss.backward()
            losses.append(loss.detach())
            del loss
        return torch.stack(losses).float(), x

    def backward_of(self, k: int, images: Tensor, pixels: Tensor, labels: Tensor, amp: bool = False) -> Tensor:
        """Asynchronous training: module k's gradient alone, on what those before make of the images; its loss (1,).

        `train_only(k)` says how those before behave.
        """
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            h = self.network.run(images, 0, self.bounds[k])
        return self.backward(h, pixels, labels, amp, (k,))[0]

    def train_only(self, k: int) -> None:
        """Train mode for module k; those before, trained already, in the form of the test: running statistics, and still."""
        self.train()
        for unit in self.network.units[: self.bounds[k]]:
            unit.eval()
