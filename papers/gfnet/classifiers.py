"""f_C: from the features of the steps so far to the logits of this step (paper, section 3.2; official file: network.py).

Both read the feature (B, F) of one step and a state (B, ...), None before step 1, and give the logits and the new state.
A state has one row an image, so the rows of images that stop can be left out.
"""

import torch
from torch import Tensor, nn


class RecurrentClassifier(nn.Module):
    """Type A: a GRU from h_0 = 0, and the same linear layer at every step; the state is h_t (B, hidden)."""

    def __init__(self, feature_dim: int, classes: int, hidden: int = 1024):
        super().__init__()
        self.gru = nn.GRUCell(feature_dim, hidden)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, feature: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.gru(feature, state)
        return self.fc(h), h


class ConcatClassifier(nn.Module):
    """Type B: step t = 2..T has its own linear layer, on the features of steps 1..t, which are the state (B, t * F).

    Step 1 has none: the logits are None there, and those of f_G's own head stand in for them.
    """

    def __init__(self, feature_dim: int, classes: int, steps: int):
        super().__init__()
        self.feature_dim, self.steps = feature_dim, steps
        self.fc = nn.ModuleList(nn.Linear(t * feature_dim, classes) for t in range(2, steps + 1))

    def forward(self, feature: Tensor, state: Tensor | None) -> tuple[Tensor | None, Tensor]:
        if state is None:
            return None, feature
        state = torch.cat([state, feature], dim=1)
        t = state.shape[1] // self.feature_dim
        if t > self.steps:
            raise ValueError(f"step {t} of a classifier for {self.steps} steps")
        return self.fc[t - 2](state), state
