"""A folder of images as one uint8 tensor."""

import collections
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from fastgan.data.idx import DataError

_MODES = {1: "L", 3: "RGB"}
_NAMED = 10  # images that cannot be read, in an error


def load_folder(folder: Path, image_size: int, channels: int) -> torch.Tensor:
    """Read every image below a folder, resized so that the shorter side fits and cropped at the centre.

    Args:
        folder: an existing folder, searched with its subfolders and those that links lead to, each of them once; files and
            folders whose name starts with a dot are left out.
        image_size: height and width in pixels.
        channels: 1 for grey, 3 for RGB; images of another kind are converted.

    Returns:
        uint8 tensor [N, channels, image_size, image_size], in the order of the sorted paths.

    Raises:
        DataError: no image in the folder, or images that cannot be read.
    """
    paths = _image_paths(folder)
    images = torch.empty(len(paths), channels, image_size, image_size, dtype=torch.uint8)
    failures: list[tuple[Path, Exception]] = []

    def load(index: int) -> None:
        try:
            pixels = _load_image(paths[index], image_size, channels)
            images[index] = torch.from_numpy(pixels).reshape(image_size, image_size, channels).permute(2, 0, 1)
        # PIL raises OSError, ValueError, SyntaxError, struct.error and more on damaged files.
        except Exception as error:
            failures.append((paths[index], error))

    # Decoding and resizing release the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(load, range(len(paths))):
            pass
    if failures:
        failures.sort(key=lambda failure: failure[0])
        named = [f"{path} ({error or type(error).__name__})" for path, error in failures[:_NAMED]]
        more = [f"{len(failures) - _NAMED} more"] if len(failures) > _NAMED else []
        raise DataError(
            f"{len(failures)} of the {len(paths)} images in {folder} cannot be read; repair or remove {', '.join(named + more)}"
        )
    return images


def _image_paths(folder: Path) -> list[Path]:
    # Of formats that PIL can read, not of those it can only write; MPO is read as JPEG.
    endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN or name == "MPO"}
    paths, others = [], collections.Counter()
    # A link is followed when the folders before it are read: what both lead to is then found without it.
    pending, seen = [folder], set()
    for parent, subfolders, names in itertools.chain.from_iterable(map(os.walk, pending)):  # which grows meanwhile
        if (real := os.path.realpath(parent)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        pending += [path for name in subfolders if os.path.islink(path := os.path.join(parent, name))]
        for name in names:
            if name.startswith("."):
                continue
            ending = os.path.splitext(name)[1].lower()
            if ending in endings:
                paths.append(Path(parent, name))
            else:
                others[ending or "no ending"] += 1
    if not paths:
        found = ", ".join(f"{count} x {ending}" for ending, count in others.most_common(5)) or "no file at all"
        raise DataError(f"{folder}: no image in it or below it (found {found}; wanted .png, .jpg, .webp, ...)")
    return sorted(paths)


def _load_image(path: Path, image_size: int, channels: int) -> np.ndarray:
    with Image.open(path) as image:
        # A JPEG decodes several times faster at a half, quarter or eighth of its size.
        image.draft(None, (2 * image_size, 2 * image_size))
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels, whose black and white are not known; save it with 8 or 16 bits")
        if image.mode.startswith("I"):
            # 16-bit grey: PIL's own conversion clips everything above 255 to white.
            image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
        image = image.convert(_MODES[channels])
        return np.array(ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR))
