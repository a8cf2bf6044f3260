#!/usr/bin/env python3
"""Trains an NVAE: ``python train_keras.py --config digits``."""

import sys

from nvae_tf.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
