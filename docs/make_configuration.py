#!/usr/bin/env python3
"""Writes docs/configuration.md from the configuration's own fields."""

from pathlib import Path

from nvae_tf.config import KEYS, SECTIONS, allowed_range
from nvae_tf.files import write_text

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

A recipe is a YAML file with one key a line; `configs/` holds those of the paper. Every key is also a
flag of `train_keras.py` and `tune_keras.py`, which takes precedence: `--num_latent_per_group 16`,
`--use_se`, `--no-use_se`. Names are the official implementation's wherever it has the flag. A run's
folder holds its resolved configuration, every key included, as `config.yaml`.

This page is made from the code by `python docs/make_configuration.py`.
"""
TITLES = {"model": "Model", "data": "Data", "train": "Training"}


def page() -> str:
    """The page's text."""
    lines = [HEAD]
    for section, made in SECTIONS.items():
        lines += [f"## {TITLES[section]}", "", made.__doc__.splitlines()[0], ""]
        lines += ["| key | default | meaning |", "| --- | --- | --- |"]
        for name, (part, field) in KEYS.items():
            if part == section:
                default = "empty" if field.default == "" else f"`{field.default}`"
                default = default.replace("True", "true").replace("False", "false")
                choices = field.metadata["choices"]
                values = f"; one of {', '.join(choices)}" if choices else allowed_range(field)
                lines.append(f"| `{name}` | {default} | {field.metadata['help']}{values} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"written: {PAGE}")
