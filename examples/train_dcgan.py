"""Train a DCGAN. Without flags: handwritten digits on the CPU (or GPU) in a few minutes, in runs/dcgan."""

import sys

from fastgan.train import DCGANConfig, run

if __name__ == "__main__":
    sys.exit(run(DCGANConfig))
