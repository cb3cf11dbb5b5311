"""Cut a training folder out of a few large photographs: square crops of random size and place, half of them mirrored.

For trying `--dataset folder`, and small sets of images, where no collection is at hand.
"""

import argparse
import random
import sys
from pathlib import Path

from PIL import Image, ImageOps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="+", type=Path, metavar="PHOTOGRAPH")
    parser.add_argument("--output", type=Path, default=Path("runs/crops"), help="new folder (default: runs/crops)")
    parser.add_argument("--count", type=int, default=48, help="crops in all, as many of each photograph (default: 48)")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of places and sizes (default: 0)")
    arguments = parser.parse_args()
    if arguments.count < 1 or arguments.size < 1:
        parser.error(f"--count and --size must be at least 1, got {arguments.count} and {arguments.size}")
    if arguments.output.exists():
        parser.error(f"--output {arguments.output}: exists already")
    chance = random.Random(arguments.seed)
    try:
        photographs = [(path.stem, ImageOps.exif_transpose(Image.open(path)).convert("RGB")) for path in arguments.photographs]
        arguments.output.mkdir(parents=True)
    except OSError as error:
        parser.error(str(error))
    for number in range(arguments.count):
        name, photograph = photographs[number % len(photographs)]
        side = chance.randint(min(photograph.size) // 3, min(photograph.size) * 2 // 3)
        left, top = (chance.randint(0, length - side) for length in photograph.size)
        crop = photograph.crop((left, top, left + side, top + side))
        crop = crop.resize((arguments.size, arguments.size), Image.Resampling.LANCZOS)
        crop = ImageOps.mirror(crop) if chance.random() < 0.5 else crop
        crop.save(arguments.output / f"{number:05d}_{name}.png")
    print(f"{arguments.count} crops of {len(photographs)} photographs in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
