"""The paths of one training run: configuration, checkpoints, logs and pictures."""

import dataclasses
import json
from pathlib import Path

from nvae_tf import config as configuration
from nvae_tf.config import Config
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import make_folder, read_json, write_text

CHECKPOINT_PREFIX = "state"  # of the names of TensorFlow's files in a checkpoint's folder
SESSION = "session"  # tag of the texts in the logs that say how each process was started
LARGEST_IMAGES_FILE = 100_000  # bytes; ours have 300


class RunFolder:
    """Paths of a run.

    Args:
        path: Path of the run's folder, ``ROOT/SAVE``.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.yaml"
        self.images_file = path / "images.json"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.samples = path / "samples.png"
        self.reconstructions = path / "reconstructions.png"

    def list_checkpoints(self) -> list[Path]:
        """Returns the folders of complete checkpoints, newest first."""
        folders = [path for path in self.checkpoints.glob("step-*") if path.name[5:].isdigit()]
        return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)

    def check_free(self, resume: bool) -> None:
        """Checks that training may use the folder, as far as that depends on no configuration.

        Args:
            resume: Whether to continue the run that is in the folder.

        Raises:
            UserError: The folder holds a run and `resume` is not set, or it cannot hold one.
        """
        if set("[\\") & set(str(self.path.absolute())):
            raise UserError(
                f"{self.path}: TensorFlow reads no checkpoints in a folder whose path holds [ or \\; "
                "choose another one (--root, --save)"
            )
        if not resume and (self.config_file.exists() or self.list_checkpoints()):
            raise UserError(
                f"{self.path} holds a run already: continue it (--cont_training; resume=True of "
                "nvae_tf.train), or choose another folder (--save)"
            )

    def check(
        self,
        config: Config,
        resume: bool,
        facts: dict[str, int] | None = None,
        image: ImageSpec | None = None,
    ) -> None:
        """Checks that training with this configuration may use the folder.

        Args:
            config: Configuration of the training.
            resume: Whether to continue the run that is in the folder.
            facts: As for `create`.
            image: The images, which say what ``auto`` means.

        Raises:
            UserError: The folder holds a run and `resume` is not set, or that run has another model or
                other data.
        """
        self.check_free(resume)
        if self.config_file.exists():
            self._check_continues(config, image)
            before = self.own_images() if facts else {}
            for name, value in (facts or {}).items():
                if before.get(name) != value:
                    raise UserError(
                        f"dataset: other images than those of the run in {self.path} ({name}: {value}, "
                        f"and {before.get(name)} there); start another run, in a folder of its own"
                    )

    def create(
        self, config: Config, image: ImageSpec | None = None, facts: dict[str, int] | None = None
    ) -> None:
        """Makes the folder and writes the configuration.

        Args:
            config: Configuration of the run.
            image: The images, if they were given in Python: no configuration describes them.
            facts: Names and values of further facts about those.

        Raises:
            UserError: The folder cannot be written.
        """
        make_folder(self.checkpoints)
        if image is not None:
            content = {"image": dataclasses.asdict(image), **(facts or {})}
            write_text(self.images_file, json.dumps(content, indent=2) + "\n")
        write_text(self.config_file, config.to_yaml())

    def own_images(self) -> dict:
        """What `create` wrote about images that were given in Python: ``image``, and further facts.

        Raises:
            UserError: The file is missing or damaged.
        """
        content = read_json(self.images_file, LARGEST_IMAGES_FILE)
        try:
            return {**content, "image": ImageSpec(**content["image"])}
        except (TypeError, KeyError, UserError) as error:
            raise UserError(f"{self.images_file}: not a description of images ({error})") from None

    def _check_continues(self, config: Config, image: ImageSpec | None) -> None:
        there = configuration.load(str(self.config_file))
        before, after = there.to_dict(), config.to_dict()
        if image is not None and there.model.x_bits(image) == config.model.x_bits(image):
            before["num_x_bits"] = after["num_x_bits"]
        for name, (part, _) in configuration.KEYS.items():
            # The data may be in another place, and schedule and reports may change. So may the images
            # per replica, as long as the images per step stay the same (see `CheckpointManager`).
            elsewhere = name in ("data", "batch_size", "strict")
            may_change = elsewhere or (part == "train" and name != "optimizer")
            if not may_change and before[name] != after[name]:
                raise UserError(
                    f"{name}: {after[name]} does not continue the run in {self.path}, which has "
                    f"{before[name]}; start another run, in a folder of its own"
                )
