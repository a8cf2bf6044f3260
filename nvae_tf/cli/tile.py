"""The mode ``tiles`` of ``evaluate_keras.py``: images larger than those of training."""

from pathlib import Path
from typing import Any

from nvae_tf.cli.model import load
from nvae_tf.cli.show import latent_groups
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import atomic_write, write_png
from nvae_tf.io.paths import user_path

BRIGHTEST = 99.5  # percentile of a map that is shown white


def tiles(arguments) -> None:
    """Writes for each image a picture of it, its reconstruction and its map, and arrays."""
    if not arguments.images:
        raise UserError("tiles needs --images FILE...: images at least as large as the model's")
    paths = [user_path(text) for text in arguments.images]
    names = [name + ending for name in _names(paths) for ending in (".png", ".npz")]
    loaded, written = load(arguments, *names)
    import numpy as np

    from nvae_tf.data.whole_image import read_whole
    from nvae_tf.evaluation import tiles as scoring
    from nvae_tf.evaluation.stored_images import to_levels
    from nvae_tf.io.labelled_grid import Band, labelled_grid

    model = loaded.model
    groups = latent_groups(arguments, model) if arguments.groups else []

    def read(path: Path):
        return read_whole(path, model.image, loaded.config.data.alpha)

    # All images are read before any is scored, so that mistakes show within seconds; and then again,
    # since only one has to fit into memory.
    for path in paths:
        if path.is_dir():
            raise UserError(
                f"--images: {path}: is a folder; tiles needs the image files themselves"
            )
        levels = read(path)
        try:
            scoring.tile_positions(model, levels, arguments.stride)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    for path, picture, arrays in zip(paths, written[::2], written[1::2], strict=True):
        image = _as_the_model_sees(read(path), model)
        result = scoring.score(
            model,
            image,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            groups=groups,
        )
        low, high = result.bits.min(), np.percentile(result.bits, BRIGHTEST)
        shown = np.clip((result.bits - low) / max(high - low, 1e-6), 0.0, 1.0)[..., None]
        shown = np.broadcast_to(shown, image.shape)
        note = f"map: bits per dim from {low:.2f}, black, to {high:.2f}, white"
        rows = np.stack([image, result.reconstruction, shown])
        write_png(picture, labelled_grid([Band(rows)], 3, "Image, reconstruction, map", note))
        z: dict[str, Any] = {f"z_{g:02d}": z for g, z in zip(groups, result.z, strict=True)}
        with atomic_write(arrays) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                neg_log_likelihood=result.neg_log_likelihood,
                bits=result.bits,
                reconstruction=to_levels(result.reconstruction, model.image),
                kl=result.kl,
                positions=result.positions,
                tile_size=np.array(result.size),
                **z,
            )
        print(
            f"{path}: {image.shape[1]}x{image.shape[0]}, {len(result.positions)} tiles, mean "
            f"{result.bits.mean():.4f} bits per dim of the tiles; the map shows {low:.2f} black "
            f"and {high:.2f} white"
        )
    print("written: " + ", ".join(map(str, written)))


def _as_the_model_sees(levels, model):
    """Images in [0, 1] with the bits of the model; binary ones are 1 from half of the last level on."""
    if model.image.binary:
        return (levels > 2 ** (model.image.bits - 1) - 1).astype("float32")
    fewer = levels >> (model.image.bits - model.num_bits)
    return fewer.astype("float32") / (2**model.num_bits - 1)


def _names(paths: list[Path]) -> list[str]:
    """A name for each image's results; files of several folders may share theirs."""
    names: list[str] = []
    for path in paths:
        number, name = 2, f"tiles_{path.stem}"
        while name in names:
            name, number = f"tiles_{path.stem}_{number}", number + 1
        names.append(name)
    return names
