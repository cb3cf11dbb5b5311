"""Train ten GANs on N(3, 0.5) side by side and draw them. Without flags: in seconds, in runs/gaussian."""

import sys

from fastgan.laboratory import run

if __name__ == "__main__":
    sys.exit(run())
