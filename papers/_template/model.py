"""The method: torch and torchvision only, so that the folder travels. One idea a file; the paper's symbols in comments."""

from torch import Tensor, nn


class Network(nn.Module):
    """(N, 3, H, W) images -> (N, classes) logits (section 3). Replace by the paper's network.

    width: channels; norm: the paper's idea, batch normalisation here. ValueError for sizes that make no network.
    """

    def __init__(self, width: int = 16, classes: int = 10, norm: bool = True):
        super().__init__()
        if width < 1 or classes < 2:
            raise ValueError(f"width={width}, classes={classes}: expected at least 1 and 2")
        layers = []
        for inputs, outputs in ((3, width), (width, 2 * width)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=not norm)]
            layers += [nn.BatchNorm2d(outputs)] if norm else []
            layers += [nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(x.shape)}, expected (N, 3, H, W)")
        return self.classifier(self.features(x).mean((2, 3)))
