"""Checks that all workers were started in the same way; all call each function at the same time."""

import os
import zlib
from collections.abc import Sequence

import tensorflow as tf

from nvae_tf import __version__
from nvae_tf.config import KEYS, Config
from nvae_tf.data import catalog
from nvae_tf.data.own import OwnImages
from nvae_tf.data.source import Source
from nvae_tf.io.errors import UserError
from nvae_tf.model import NVAE, model_digest
from nvae_tf.training.cluster import Cluster


def check_same_flags(
    config: Config, resume: bool, cluster: Cluster, own: OwnImages | None, start_from: NVAE | None
) -> None:
    """Checks that all workers run the same version with the same configuration.

    Args:
        config: The configuration.
        resume: Whether a run is continued.
        cluster: The workers.
        own: Images that were given in Python, or None.
        start_from: The model that a new run begins with, or None.

    Raises:
        UserError: A version or a setting differs between workers.
    """
    versions = {
        "nvae-tf": f"{__version__} {' '.join(KEYS)}",
        "TensorFlow": tf.__version__,
    }
    different = cluster.disagreements(versions)
    if different:
        raise UserError(
            f"another worker has another version of {' and '.join(different)} (here: nvae-tf "
            f"{__version__}, TensorFlow {tf.__version__}); install the same on all"
        )
    # Where the data is may differ from machine to machine.
    flags = {name: str(value) for name, value in config.to_dict().items() if name != "data"}
    flags["images"] = str(own and own.facts)
    flags["init_from"] = "not given"
    if start_from is not None and cluster.num_workers > 1:
        flags["init_from"] = f"a model of checksum {model_digest(start_from)[:8]}"
    different = cluster.disagreements({**flags, "cont_training": str(resume)})
    if different:
        here = ", ".join(f"{name} is {flags.get(name, resume)} here" for name in different)
        raise UserError(
            f"another worker has another configuration: {here}; start all workers with the same flags"
        )


def check_same_images(config: Config, cluster: Cluster, sources: Sequence[Source]) -> None:
    """Checks that all workers found the same images.

    Args:
        config: The configuration, with everything about the images resolved.
        cluster: The workers.
        sources: Training and test images.

    Raises:
        UserError: The description or the number of images, or the names of their files, differ between
            workers.
    """
    if cluster.num_workers == 1:  # there is nobody to compare with, and file names may be millions
        return
    found = {name: str(getattr(config.data, name)) for name in catalog.FOUND}
    found["number of images"] = " and ".join(str(len(source)) for source in sources)
    names = "\n".join(name for source in sources for name in source.file_names())
    found["checksum of file names"] = str(zlib.crc32(os.fsencode(names)))
    different = cluster.disagreements(found)
    if different:
        here = ", ".join(f"{name} is {found[name]} here" for name in different)
        raise UserError(
            f"another worker found other images: {here}; give all workers the same files in --data"
        )


def check_same_start(cluster: Cluster, start_step: int, checksum: int) -> None:
    """Checks that all workers restored the same checkpoint.

    Args:
        cluster: The workers.
        start_step: Step of the checkpoint that this worker has restored; 0 for none.
        checksum: Checksum of that checkpoint.

    Raises:
        UserError: The step or the checkpoint differs between workers.
    """
    different = cluster.disagreements({"step": str(start_step), "checkpoint": str(checksum)})
    if different:
        what = "does not" if "step" in different else "from another checkpoint of that step"
        raise UserError(
            f"this worker continues from step {start_step} and another one {what}: all workers need "
            "the same --root and --save, on a file system that they share"
        )
