"""Makes the embedded ``digits`` set from the MNIST files: ``python -m fastgan.data.make_digits MNIST_DIR``.

The set is the first 1,000 training and the first 200 test images of every digit, in their original
order, losslessly: 10,000 + 2,000 images as gzipped IDX files, which is MNIST's own format.
"""

import sys
from pathlib import Path

import torch

from fastgan.data.datasets import DIGITS_FOLDER, find_idx_pair
from fastgan.data.idx import read_idx, write_idx

PER_CLASS = {"train": 1000, "test": 200}


def main(mnist: Path) -> None:
    for split, count in PER_CLASS.items():
        images_path, labels_path = find_idx_pair(mnist, split)
        images, labels = read_idx(images_path, "images"), read_idx(labels_path, "labels")
        chosen = torch.cat([(labels == digit).nonzero().flatten()[:count] for digit in range(10)]).sort().values
        for path, array in ((images_path, images), (labels_path, labels)):
            write_idx(DIGITS_FOLDER / f"{path.name.removesuffix('.gz')}.gz", array[chosen])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
