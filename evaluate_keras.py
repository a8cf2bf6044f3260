#!/usr/bin/env python3
"""Evaluates an NVAE: ``python evaluate_keras.py --checkpoint runs/digits --eval_mode evaluate``."""

import sys

from nvae_tf.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
