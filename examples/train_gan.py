"""Train ten GANs of multilayer perceptrons at once, one a digit. Without flags: on the embedded digits, in runs/gan."""

import sys

from fastgan.train import GANConfig, run

if __name__ == "__main__":
    sys.exit(run(GANConfig))
