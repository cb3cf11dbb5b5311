"""`python -m fastgan.metrics` is `fastgan evaluate`."""

import sys

from fastgan.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
