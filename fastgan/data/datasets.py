"""Data sets by name, held in memory as uint8 tensors."""

import dataclasses
import hashlib
import http.client
import os
import tempfile
import urllib.request
import warnings
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan.data.folder import load_folder
from fastgan.data.idx import DataError, read_bytes, read_idx

DATASETS = ("digits", "mnist", "fashion-mnist", "folder")
SPLITS = ("train", "test")

# Embedded; made from MNIST by fastgan/data/make_digits.py.
DIGITS_FOLDER = Path(__file__).parent / "digits"

_IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_SYSTEM_ROOTS = (Path("/usr/share/datasets"), Path("/usr/local/share/datasets"))
# Folder names below a root: Debian's packages, then torchvision's layout.
_SUBFOLDERS = {
    "mnist": ("mnist", "MNIST/raw"),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw"),
}
_MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion-mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
}
# SHA-256 of the decompressed files: mirrors differ in how they compressed them.
_SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """Images, and their labels where the set has them.

    Attributes:
        name: one of ``DATASETS``.
        images: uint8 [N, channels, image_size, image_size].
        labels: int64 [N] with values from 0, or None.
    """

    name: str
    images: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return tuple(self.images.shape[1:])

    def fingerprint(self) -> int:
        """CRC-32 of all pixels, to tell whether a later run sees the same data."""
        return zlib.crc32(self.images.contiguous().numpy())


def load_dataset(
    name: str,
    data_root: str | os.PathLike | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    split: str = "train",
) -> ImageDataset:
    """Load a data set by name.

    Args:
        name: ``"digits"`` (10,000 + 2,000 MNIST images that come with the package), ``"mnist"``,
            ``"fashion-mnist"`` (raw or gzipped IDX files, looked for in ``data_root``,
            ``$FASTGAN_DATA``, the system's ``share/datasets`` and the user's cache; else downloaded
            and checked) or ``"folder"`` (every image below ``data_root``).
        data_root: where the files are; required for ``"folder"``.
        image_size: height and width of the images in pixels; None keeps 28 for the MNIST family and
            means 64 for ``"folder"``. 28-pixel images get a black border to make 32, any other size
            is interpolated (bilinear, antialiased).
        channels: 1 for grey, 3 for RGB; None means 1 for the MNIST family and 3 for ``"folder"``.
        split: ``"train"`` or ``"test"``; ``"folder"`` has no test images.

    Returns:
        The images, in memory.

    Raises:
        DataError: unknown name, or data that is missing, damaged or of the wrong kind.
    """
    if name not in DATASETS:
        raise DataError(f"load_dataset: name must be one of {', '.join(DATASETS)}, got {name!r}")
    if split not in SPLITS:
        raise DataError(f"load_dataset: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if channels not in (None, 1, 3):
        raise DataError(f"load_dataset: channels must be 1 (grey) or 3 (RGB), got {channels}")
    if image_size is not None and image_size < 1:
        raise DataError(f"load_dataset: image_size must be at least 1, got {image_size}")
    root = None if data_root is None else Path(data_root).expanduser()
    if root is not None and not root.is_dir():
        raise DataError(f"--data-root: no such folder: {root}")
    if name == "folder":
        if root is None:
            raise DataError("the data set 'folder' needs --data-root, the folder that holds the images")
        if split != "train":
            raise DataError("the data set 'folder' has no test images; point --data-root to a folder of them")
        return ImageDataset(name, load_folder(root, image_size or 64, channels or 3), None)
    images, labels = _load_idx_pair(*_idx_paths(name, root, split))
    images = _resize(images[:, None], image_size or images.shape[-1])
    return ImageDataset(name, images.repeat(1, channels or 1, 1, 1), labels)


def find_idx_pair(folder: Path, split: str) -> tuple[Path, Path] | None:
    """Paths of the images and the labels of a split in a folder, raw or gzipped; None without images."""
    found = []
    for stem in _IDX_NAMES[split]:
        # A dot before "idx" is how some mirrors and unpackers name them.
        names = [stem, stem.replace("-idx", ".idx")]
        candidates = [folder / f"{name}{ending}" for ending in ("", ".gz") for name in names]
        found.append(next((path for path in candidates if path.is_file()), None))
    images, labels = found
    if images is None:
        return None
    if labels is None:
        raise DataError(f"{images}: its labels, {_IDX_NAMES[split][1]}[.gz], are missing in {folder}")
    return images, labels


def _idx_paths(name: str, root: Path | None, split: str) -> tuple[Path, Path]:
    if name == "digits":
        return find_idx_pair(DIGITS_FOLDER, split)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastgan"
    chosen = [root] if root else []
    if os.environ.get("FASTGAN_DATA"):
        chosen.append(Path(os.environ["FASTGAN_DATA"]).expanduser())
    others = {subfolder for other, subfolders in _SUBFOLDERS.items() if other != name for subfolder in subfolders}
    folders = []
    for base in chosen:
        folders += [base / subfolder for subfolder in _SUBFOLDERS[name]]
        # MNIST and Fashion-MNIST share their file names: a folder named after the other set is the other set.
        if not any(str(base.resolve()).endswith(f"/{other}") for other in others):
            folders.append(base)
    folders += [base / _SUBFOLDERS[name][0] for base in (*_SYSTEM_ROOTS, cache)]
    for folder in folders:
        if pair := find_idx_pair(folder, split):
            break
    else:
        pair = _download(name, split, folders)
    if root is not None and root not in pair[0].parents:
        missing = f"--data-root {root}: no {_IDX_NAMES[split][0]}[.gz] of {name} there"
        warnings.warn(f"{missing}; those of {pair[0].parent} are taken", stacklevel=3)
    return pair


def _download(name: str, split: str, searched: list[Path]) -> tuple[Path, Path]:
    """Fetch the two files of a split into the last of the searched folders, the user's cache."""
    target = searched[-1]
    for stem in _IDX_NAMES[split]:
        failures = []
        for mirror in _MIRRORS[name]:
            try:
                _fetch(f"{mirror}{stem}.gz", target / f"{stem}.gz", _SHA256[name][stem])
                break
            except (OSError, http.client.HTTPException, DataError) as error:
                failures.append(f"{mirror}{stem}.gz: {error}")
        else:
            raise DataError(
                f"{name}: no {stem}[.gz] in {', '.join(map(str, searched))}, and the download failed "
                f"({'; '.join(failures)}). Put {' and '.join(_IDX_NAMES[split])} (raw or .gz) into one of "
                "these folders, or name their folder with --data-root"
            )
    return find_idx_pair(target, split)


def _fetch(url: str, path: Path, sha256: str) -> None:
    """Download a gzipped file; it appears under its name only when it is whole and its checksum fits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".download-") as folder:
        part = Path(folder, path.name)
        with urllib.request.urlopen(url, timeout=30) as response:
            part.write_bytes(response.read())
        found = hashlib.sha256(read_bytes(part)).hexdigest()
        if found != sha256:
            raise DataError(f"the SHA-256 of the decompressed file must be {sha256}, got {found}")
        part.replace(path)


def _load_idx_pair(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_idx(images_path, "images"), read_idx(labels_path, "labels")
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path}")
    if images.shape[1] != images.shape[2]:
        raise DataError(f"{images_path}: images must be square, got {images.shape[1]} x {images.shape[2]} pixels")
    return images, labels.long()


def _resize(images: Tensor, image_size: int) -> Tensor:
    """uint8 [N, C, H, H] to uint8 [N, C, image_size, image_size]."""
    height = images.shape[-1]
    if height == image_size:
        return images
    if (height, image_size) == (28, 32):
        # The usual way to bring MNIST to a power of two: the strokes stay as sharp as they were.
        return F.pad(images, (2, 2, 2, 2))
    size = (image_size, image_size)
    return torch.cat(
        [
            F.interpolate(part.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
            for part in images.split(4096)
        ]
    )
