"""`python -m fastgan` prints what this installation is made of; with arguments it is the command `fastgan`."""

import sys

from fastgan.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["info"]))
