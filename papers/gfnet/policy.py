"""Where to look next: the recurrent policy pi of section 3.1 with its critic, and the ways to choose a location.

A `locate(t, e)` is called after step t = 1, ..., T-1 with e_t (B, C, n, n) and gives the place (B, 2) in [0, 1] of the crop
of step t + 1: `Locator` (learned), `uniform` (random crops, Stage I) and `centre`. Layers in the order of the official code
(blackfeather-wang/GFNet-Pytorch @ 8a6775c8267c, network.py).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .ppo import STD, log_prob


class Policy(nn.Module):
    """Encoder of e_t, GRU cell, actor (mean of the next location) and critic (value of the state).

    Made by `Policy.linear` (ResNet, DenseNet) or `Policy.conv` (all others). forward(e (B, C, n, n), h (B, hidden) or None
    before the first step) -> mean (B, 2) in (0, 1), value (B,), h (B, hidden). e is detached: the policy's losses never
    reach the encoders.
    """

    def __init__(self, encode: nn.Sequential, hidden: int, e_shape: tuple[int, int, int]):
        super().__init__()
        self.encode, self.hidden, self.e_shape = encode, hidden, e_shape
        self.gru = nn.GRUCell(hidden, hidden)
        self.actor = nn.Linear(hidden, 2)
        self.critic = nn.Linear(hidden, 1)

    @classmethod
    def linear(cls, channels: int, map_size: int, widths: Sequence[int] = (2048, 1024)) -> "Policy":
        """Two linear layers on all of e, C x n x n; the last width is that of the GRU."""
        wide, hidden = widths
        first = nn.Linear(channels * map_size**2, wide)
        encode = nn.Sequential(nn.Flatten(), first, nn.ReLU(), nn.Linear(wide, hidden), nn.ReLU())
        return cls(encode, hidden, (channels, map_size, map_size))

    @classmethod
    def conv(cls, channels: int, map_size: int, conv: int = 32, hidden: int = 256) -> "Policy":
        """A 1x1 convolution to `conv` channels, then one linear layer."""
        squeeze = nn.Conv2d(channels, conv, kernel_size=1, bias=False)
        linear = nn.Linear(conv * map_size**2, hidden)
        encode = nn.Sequential(squeeze, nn.ReLU(), nn.Flatten(), linear, nn.ReLU())
        return cls(encode, hidden, (channels, map_size, map_size))

    def forward(self, e: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if e.shape[1:] != self.e_shape:
            raise ValueError(
                f"feature map of shape {tuple(e.shape)}, expected (B, {', '.join(map(str, self.e_shape))})"
            )
        # No autocast: a bfloat16 mean would move a crop by a pixel, and its log-probability by a per cent or more.
        with torch.autocast("cuda" if e.is_cuda else "cpu", enabled=False):
            h = self.gru(self.encode(e.detach().to(self.actor.weight.dtype)), h)
            return self.actor(h).sigmoid(), self.critic(h).squeeze(1), h


class Locator:
    """The policy as `locate(t, e)`, with its state; t = 1 starts new images. Nothing here has a gradient.

    Without noise (test) the location is the mean. With noise, a function of B that draws (B, 2) standard normals, it is
    clamp(mean + 0.1 noise, 0, 1), and the sequence is kept for PPO: `es`, `locations`, `log_probs` (of the clamped
    locations, see `ppo.log_prob`) and `values`, lists with one entry a step.
    """

    def __init__(self, policy: Policy, noise: Callable[[int], Tensor] | None = None):
        self.policy, self.noise = policy, noise
        self._start()

    def _start(self) -> None:
        self.h: Tensor | None = None
        self.es: list[Tensor] = []
        self.locations: list[Tensor] = []
        self.log_probs: list[Tensor] = []
        self.values: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, t: int, e: Tensor) -> Tensor:
        if t == 1:
            self._start()
        elif self.h is None:
            raise ValueError(f"step t={t} without the steps before it, expected t=1 first")
        mean, value, self.h = self.policy(e, self.h)
        if self.noise is None:
            return mean
        location = (mean + STD * self.noise(len(e))).clamp(0, 1)
        self.es.append(e.detach())
        self.locations.append(location)
        self.log_probs.append(log_prob(location, mean))
        self.values.append(value)
        return location


def uniform(draw: Callable[[int], Tensor]) -> Callable[[int, Tensor], Tensor]:
    """Random crops: draw, a function of B, gives (B, 2) uniform on [0, 1] on the images' device -> locate(t, e)."""
    return lambda t, e: draw(len(e))


def centre(t: int, e: Tensor) -> Tensor:
    """Always the middle of the image: (B, 2) of 0.5, float32."""
    return e.new_full((len(e), 2), 0.5, dtype=torch.float32)
