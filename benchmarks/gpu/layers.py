"""The convolutions of the 64-px DCGAN."""

# (transposed, in channels, out channels, input size): generator, then discriminator; base 64, 64 px, RGB
LAYERS = [
    (True, 100, 512, 1), (True, 512, 256, 4), (True, 256, 128, 8), (True, 128, 64, 16), (True, 64, 3, 32),
    (False, 3, 64, 64), (False, 64, 128, 32), (False, 128, 256, 16), (False, 256, 512, 8), (False, 512, 1, 4),
]  # fmt: skip


def stride_and_padding(layer):
    _, _, out_channels, size = layer
    return (1, 0) if 1 in (size, out_channels) and size in (1, 4) else (2, 1)


def flops(layer, batch):
    transposed, in_channels, out_channels, size = layer
    small = size if transposed else max(1, size // 2 if size != 4 or out_channels != 1 else 1)
    return 2 * 16 * batch * small * small * in_channels * out_channels
