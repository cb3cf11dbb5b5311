"""Networks written in the styles that people write them, for the tests of fuse()."""

import torch
from torch import nn
from torch.nn import functional as F


class FunctionalGenerator(nn.Module):
    """Layers in __init__, functions in forward; latent vectors [N, 16] to images [N, 3, 32, 32]."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(16, width * 4, 4, 1, 0, bias=False)
        self.bn1 = nn.BatchNorm2d(width * 4)
        self.conv2 = nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width * 2)
        self.conv3 = nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv4 = nn.ConvTranspose2d(width, 3, 4, 2, 1)

    def forward(self, z):
        x = z.view(z.size(0), -1, 1, 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x)).relu_()
        return torch.tanh(self.conv4(x))


class FunctionalDiscriminator(nn.Module):
    """Images [N, 3, 32, 32] to logits [N]."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, 2, 1)
        self.conv2 = nn.Conv2d(width, width * 2, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width * 2)
        self.conv3 = nn.Conv2d(width * 2, width * 4, 4, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.act = nn.LeakyReLU(0.2, inplace=True)
        self.out = nn.Conv2d(width * 4, 1, 4)

    def forward(self, x):
        x = F.leaky_relu(self.conv1(x), 0.2)
        x = F.leaky_relu(self.bn2(self.conv2(x)), negative_slope=0.2, inplace=True)
        x = self.act(self.bn3(self.conv3(x)))
        return self.out(x).flatten()


class ResidualBlock(nn.Module):
    """Two layers and a shortcut, at half the size: [N, C, H, W] to [N, out, H / 2, W / 2]."""

    def __init__(self, channels, out):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 4, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 2, 2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.act(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        h += self.shortcut(x)
        return self.act(h)


class ResidualDiscriminator(nn.Module):
    """Blocks of somebody's own class inside an nn.Sequential; images [N, 3, 32, 32] to logits [N]."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.1))
        self.blocks = nn.Sequential(ResidualBlock(width, width * 2), ResidualBlock(width * 2, width * 4))
        self.out = nn.Linear(width * 4, 1)

    def forward(self, x):
        return self.out(self.blocks(self.stem(x)).mean((2, 3))).flatten()


class UpsampleGenerator(nn.Module):
    """Enlarges by nearest neighbours, then convolves; latent vectors [N, 16] to images [N, 3, 32, 32]."""

    def __init__(self, width=8):
        super().__init__()
        self.project = nn.Linear(16, width * 4 * 16)
        self.up = nn.Upsample(scale_factor=2)
        self.convs = nn.ModuleList([
            nn.Conv2d(a * width, b * width, 3, padding=1, bias=False) for a, b in ((4, 4), (4, 2), (2, 1))
        ])  # fmt: skip
        self.norms = nn.ModuleList([nn.BatchNorm2d(b * width) for b in (4, 2, 1)])
        self.to_rgb = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z):
        x = self.project(z).unflatten(1, (-1, 4, 4))
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = self.up(x) if i else F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return torch.tanh(self.to_rgb(x))


class DropoutDiscriminator(nn.Module):
    """Dropout as a module and as a function, and a branch that is taken in training alone; [N, 3, 32, 32] to [N]."""

    def __init__(self, p=0.3, width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 4, 2, 1)
        self.drop = nn.Dropout2d(p)
        self.conv2 = nn.Conv2d(width, width * 2, 4, 2, 1)
        self.bn2 = nn.BatchNorm2d(width * 2)
        self.p = p
        self.out = nn.Linear(width * 2 * 64, 1)

    def forward(self, x):
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        x = self.drop(F.leaky_relu(self.conv1(x), 0.2))
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)
        x = F.dropout(x, self.p, self.training)
        return self.out(x.flatten(1)).flatten()


class FadeGenerator(nn.Module):
    """An attribute that the training loop changes (progressive growing), and an optional argument."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(16, width, 4, 2, 1)
        self.conv2 = nn.ConvTranspose2d(width, 3, 4, 2, 1)
        self.small = nn.Conv2d(width, 3, 1)
        self.alpha = 0.0

    def forward(self, x, shift=None, scale=1.0):
        h = F.relu(self.conv1(x))
        image = torch.tanh(self.conv2(h))
        if self.alpha < 1:
            image = torch.lerp(F.interpolate(torch.tanh(self.small(h)), scale_factor=2), image, self.alpha)
        if shift is not None:
            image = image + shift
        return scale * image


class DataDependent(nn.Module):
    """Control flow that depends on the values of a tensor, beside an nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 2, 1)
        self.main = nn.Sequential(nn.Conv2d(8, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        h = F.relu(self.conv(x))
        if h.mean() > 100:
            return h
        return self.main(h)
