"""What two machines have to have in common so that one can decode what the other encoded.

Decoding needs every number that encoding computed, to the last bit. So a file says with what it was
made, and what differs is refused.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform

import numpy as np
import tensorflow as tf

from nvae_tf.compression.codec import Codec
from nvae_tf.compression.rans import Stack
from nvae_tf.io.errors import UserError, short_repr
from nvae_tf.model import NVAE, model_digest
from nvae_tf.version import __version__

LIBRARIES = ("tensorflow", "tf-keras", "tensorflow-probability", "numpy", "scipy")
BATCH = "1 image"  # what the network computes at once (`nvae_tf.compression.network`)
ONEDNN = "TF_ENABLE_ONEDNN_OPTS"  # where it is not set, TensorFlow decides
# What libraries read from the environment that changes which kernels they run.
SETTINGS = (
    ONEDNN, "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE",
    "TF_XLA_FLAGS", "XLA_FLAGS", "NPY_DISABLE_CPU_FEATURES",
)  # fmt: skip
CPU_INFO = "/proc/cpuinfo"
TRIAL_SEED = 23


def use_one_thread() -> None:
    """Computes with one thread, so that machines with other numbers of cores compute the same sums.

    It has to come before TensorFlow computes anything; later it changes nothing, and `made_with` says
    how many threads there are.
    """
    try:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        return


def made_with(model: NVAE) -> dict[str, str]:
    """All that is known of what numbers depend on, by name.

    Args:
        model: The model.
    """
    return {
        "model": model_digest(model),
        "nvae-tf": __version__,
        **{library: importlib.metadata.version(library) for library in LIBRARIES},
        "CPU": _cpu(),
        "settings": " ".join(
            f"{name}={os.environ.get(name, 'default')}"
            for name in SETTINGS
            if name in os.environ or name == ONEDNN
        ),
        "threads": _threads(),
        "batch": BATCH,
    }


def check_same(here: dict[str, str], there: dict[str, str], path) -> None:
    """Checks that a file was made with what is here.

    Args:
        here: What `made_with` returned.
        there: What the file says.
        path: Path of the file, for the error.

    Raises:
        UserError: Something differs; the error names it.
    """
    for name, value in here.items():
        if there.get(name) != value:
            if name == "model":
                raise UserError(
                    f"{path}: made with other weights or another configuration; name the model that "
                    "it was made with"
                )
            raise UserError(
                f"{path}: made with {name} {short_repr(there.get(name))}, and here it is {value!r}; "
                "the numbers could differ, so decode it where they are the same"
            )


def trial_digest(codec: Codec) -> str:
    """A digest of an image of noise, coded: it differs if anything else differs that matters.

    Args:
        codec: The codec.
    """
    noise = np.random.Philox(key=TRIAL_SEED)
    shape = codec.network.model.image.shape
    raw = noise.random_raw(int(np.prod(shape))).reshape(shape)
    levels = (raw % np.uint64(codec.network.max_level + 1)).astype(np.int64)
    all_latents = [np.zeros_like(part) for part in codec.left_out]
    stack = Stack.random(codec.lanes, lambda count: noise.random_raw(count).astype(np.uint32))
    dataclasses.replace(codec, left_out=all_latents, padded=False).encode(stack, levels, 0)
    return hashlib.sha256(stack.heads.tobytes() + stack.words.tobytes()).hexdigest()[:16]


def _cpu() -> str:
    """Type of the CPU, and a digest of the instructions that NumPy finds."""
    found = np.show_config(mode="dicts").get("SIMD Extensions", {})
    instructions = json.dumps([found.get("baseline"), found.get("found")]).encode()
    names = {"vendor_id": "", "cpu family": "", "model": "", "stepping": ""}
    try:
        with open(CPU_INFO, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in names and not names[key.strip()]:
                    names[key.strip()] = value.strip()
    except OSError:  # not Linux
        names = {"": platform.processor() or platform.machine()}
    return " ".join([*names.values(), hashlib.sha256(instructions).hexdigest()[:12]])


def _threads() -> str:
    get = tf.config.threading
    counts = (get.get_intra_op_parallelism_threads(), get.get_inter_op_parallelism_threads())
    return "x".join(str(count or f"all-{os.cpu_count()}") for count in counts)
