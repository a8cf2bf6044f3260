#!/usr/bin/env python3
"""Writes docs/configuration.md from the configuration's own fields."""

from pathlib import Path

from nvae_tf.config import KEYS, SECTIONS
from nvae_tf.config_keys import allowed_range
from nvae_tf.io.files import write_text

PAGE = Path(__file__).parent / "configuration.md"
HEAD = """# Configuration

A recipe is a YAML file with one key per line; `configs/` holds those of the paper. Every key is also a
flag of `train_keras.py` and `tune_keras.py`, which takes precedence: `--num_latent_per_group 16`,
`--use_se`, `--no-use_se`. Names are the official implementation's wherever it has the flag. A run's
folder holds its resolved configuration, every key included, as `config.yaml`. The key decides what a
value in YAML means: `jit_compile: off` needs no quotes, and `8_0` is not a number. An error names the
flag or the file that the value came from.

This page is written from the code by `python docs/make_configuration.py`.
"""
ENVIRONMENT = {
    "`TF_CONFIG`, Slurm's": "which machines train together: [scaling.md](scaling.md)",
    "`NVAE_SPLIT_CPU=1`": "without GPUs, `--world_size N` divides the CPU into N devices: nothing "
    "gets faster, but everything can be tried out",
    "`TF_CPP_MIN_LOG_LEVEL`": "if it is set, commands show what TensorFlow writes to standard error "
    "from this level on (`0`: everything); otherwise TensorFlow's notices are left out",
    "`TF_ENABLE_ONEDNN_OPTS`": "`1` unless it is set: oneDNN's convolutions, on every CPU",
}
TITLES = {"model": "Model", "data": "Data", "train": "Training"}


def page() -> str:
    """The page's text."""
    lines = [HEAD]
    for section, keys in SECTIONS.items():
        lines += [f"## {TITLES[section]}", "", keys.__doc__.splitlines()[0], ""]
        lines += ["| key | default | meaning |", "| --- | --- | --- |"]
        for name, (part, field) in KEYS.items():
            if part == section:
                default = "empty" if field.default == "" else f"`{field.default}`"
                default = default.replace("True", "true").replace("False", "false")
                choices = field.metadata["choices"]
                values = f"; one of {', '.join(choices)}" if choices else allowed_range(field)
                lines.append(f"| `{name}` | {default} | {field.metadata['help']}{values} |")
        lines.append("")
    lines += ["## Environment", "", "| variable | meaning |", "| --- | --- |"]
    lines += [f"| {name} | {meaning} |" for name, meaning in ENVIRONMENT.items()]
    lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"written: {PAGE}")
