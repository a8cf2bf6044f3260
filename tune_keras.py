#!/usr/bin/env python3
"""Searches for better values: ``python tune_keras.py --config digits --space FILE``."""

import sys

from nvae_tf.cli.tune import main

if __name__ == "__main__":
    sys.exit(main())
