"""The folder of one training run: configuration, checkpoints, logs and pictures."""

from pathlib import Path

from nvae_tf import config as configuration
from nvae_tf.config import Config
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import make_folder, write_text


class RunFolder:
    """Paths of a run.

    Args:
        path: ``ROOT/SAVE``.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.samples = path / "samples.png"
        self.reconstructions = path / "reconstructions.png"

    def list_checkpoints(self) -> list[Path]:
        """Folders of complete checkpoints, newest first."""
        found = [path for path in self.checkpoints.glob("step-*") if path.name[5:].isdigit()]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)

    def check(self, config: Config, resume: bool) -> None:
        """Makes sure that training with this configuration may use the folder.

        Raises:
            UserError: a run is there and `resume` is not set; or the one there has another model or
                other data.
        """
        if self.config_file.exists():
            if not resume:
                raise UserError(
                    f"{self.path} holds a run already: continue it with --cont_training, or choose "
                    "another name with --save"
                )
            self._check_continues(config)

    def create(self, config: Config) -> None:
        """Makes the folder and writes the configuration.

        Raises:
            UserError: it cannot be written.
        """
        make_folder(self.checkpoints)
        write_text(self.config_file, config.to_yaml())

    def _check_continues(self, config: Config) -> None:
        before = configuration.load(str(self.config_file)).to_dict()
        after = config.to_dict()
        for name, (part, _) in configuration.KEYS.items():
            # Where the data lies may change, and so may schedule and reports; and images per replica,
            # with the replicas, as long as a step has as many images (see `Checkpoints`).
            free = name in ("data", "batch_size") or (part == "train" and name != "optimizer")
            if not free and before[name] != after[name]:
                raise UserError(
                    f"{name}: {after[name]} does not continue the run in {self.path}, which has "
                    f"{before[name]}; start another with --save"
                )
