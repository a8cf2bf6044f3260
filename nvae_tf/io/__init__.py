"""Files and paths: atomic writes, locks and bounded readers; errors that users see; grids of images.

What is asked of the machine, its processors and child processes, is here, too.
"""
