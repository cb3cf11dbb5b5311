"""Train a CatGAN. Without flags: a digit classifier from 100 labels in a few minutes, in runs/catgan."""

import sys

from fastgan.train.catgan import CatGANConfig
from fastgan.train.command import run

if __name__ == "__main__":
    sys.exit(run(CatGANConfig))
