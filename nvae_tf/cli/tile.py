"""The mode ``tiles`` of ``evaluate_keras.py``: images larger than those of training."""

from pathlib import Path

from nvae_tf.cli.model import load
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import atomic_write, write_png
from nvae_tf.io.paths import user_path

BRIGHTEST = 99.5  # percentile of a map that is shown white


def tiles(arguments) -> None:
    """Writes for each image a picture of it, its reconstruction and its map, and arrays."""
    if not arguments.images:
        raise UserError("tiles needs --images FILE...: images at least as large as the model's")
    loaded, output = load(arguments)
    import numpy as np

    from nvae_tf.data.whole_image import read_whole
    from nvae_tf.evaluation import tiles as scoring
    from nvae_tf.evaluation.stored_images import to_levels
    from nvae_tf.io.labelled_grid import Band, labelled_grid

    model, written = loaded.model, []
    for path in map(user_path, arguments.images):
        image = _as_the_model_sees(read_whole(path, model.image, loaded.config.data.alpha), model)
        try:
            result = scoring.score(
                model,
                image,
                stride=arguments.stride,
                batch_size=arguments.batch_size,
                seed=arguments.seed,
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        low, high = result.bits.min(), np.percentile(result.bits, BRIGHTEST)
        shown = np.clip((result.bits - low) / max(high - low, 1e-6), 0.0, 1.0)[..., None]
        shown = np.broadcast_to(shown, image.shape)
        picture = _free(output / f"tiles_{path.stem}.png", written)
        arrays = picture.with_suffix(".npz")
        note = f"map: bits per dim from {low:.2f}, black, to {high:.2f}, white"
        rows = np.stack([image, result.reconstruction, shown])
        write_png(picture, labelled_grid([Band(rows)], 3, "Image, reconstruction, map", note))
        with atomic_write(arrays) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                neg_log_likelihood=result.neg_log_likelihood,
                bits=result.bits,
                reconstruction=to_levels(result.reconstruction, model.image),
                kl=result.kl,
                positions=result.positions,
                tile_size=np.array(result.size),
            )
        written += [picture, arrays]
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


def _free(path: Path, taken: list[Path]) -> Path:
    """A path that no image before has: files of several folders may share a name."""
    number, free = 2, path
    while free in taken:
        free, number = path.with_stem(f"{path.stem}_{number}"), number + 1
    return free
