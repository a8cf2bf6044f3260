"""Typed and validated configuration: the keys that a recipe in ``configs/`` may set.

Keys carry the names of the official implementation's flags. A configuration is three frozen
dataclasses that share one flat name space: `ModelConfig` (what is computed), `DataConfig` (on what)
and `TrainConfig` (how it is trained). `nvae_tf.config_keys` says what a key is, and checks values.
This module knows neither TensorFlow nor flags, and of files only YAML.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nvae_tf.architectures import ARCHITECTURES
from nvae_tf.config_keys import LARGEST_INT, NUMBER, Section, checked, key
from nvae_tf.image_spec import MAX_BITS, MAX_CHANNELS, OFFICIAL_BITS, OFFICIAL_CHANNELS, ImageSpec
from nvae_tf.io.errors import ConfigError, short_message, short_repr
from nvae_tf.io.paths import is_regular, user_path
from nvae_tf.io.text import counted

# A wheel has the recipes inside the package; a checkout has them beside it.
_INSTALLED = Path(__file__).resolve().parent / "configs"
RECIPES = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parent.parent / "configs"

# What is recomputed in the backward pass (gradient checkpointing).
NO_REMAT, BN_ACT, CELLS = REMAT_MODES = ("none", "bn_swish", "cells")
AUTO = "auto"
OFFICIAL, EXACT = "official", "exact"  # likelihoods of colour pixels
FULL = "full"  # the value range that the type of the values allows
DROP, WHITE, BLACK, KEEP = ALPHA_MODES = ("drop", "white", "black", "keep")
CENTRE, RANDOM, NONE = CROPS = ("centre", "random", "none")  # how images become square
VALIDATION_PORTION, SPLIT_SEED = 0.1, 0  # for images that are not split yet
MAX_HALVINGS = 16  # how often a model may halve an image's height and width
LARGEST_FILE = 100_000  # bytes of a YAML file; the recipes have 1,000
BUILT_IN_OPTIMIZERS = ("adamax", "adam", "adamw")

_RANGE = f"{AUTO}|{FULL}|{NUMBER.pattern},{NUMBER.pattern}"


@dataclass(frozen=True)
class ModelConfig(Section):
    """The hierarchy of the model (paper, section 3 and figure 3)."""

    arch_instance: str = key(
        "res_mbconv", "kinds of residual cells in encoder and decoder", choices=tuple(ARCHITECTURES)
    )
    num_latent_scales: int = key(
        1, "spatial scales that hold latent groups", minimum=1, maximum=MAX_HALVINGS
    )
    num_groups_per_scale: int = key(10, "latent groups per scale", minimum=1)
    ada_groups: bool = key(False, "halve the number of groups at each coarser scale")
    min_groups_per_scale: int = key(1, "with ada_groups: groups that every scale keeps", minimum=1)
    num_latent_per_group: int = key(20, "latent channels per group", minimum=1)
    num_channels_enc: int = key(32, "encoder channels at full resolution", minimum=2, even=True)
    num_channels_dec: int = key(32, "decoder channels at full resolution", minimum=2, even=True)
    num_preprocess_blocks: int = key(
        2,
        "blocks before the encoder tower; each halves the image",
        minimum=0,
        maximum=MAX_HALVINGS,
    )
    num_preprocess_cells: int = key(3, "cells per preprocess block", minimum=1)
    num_postprocess_blocks: int = key(
        2,
        "blocks after the decoder tower; each doubles the map",
        minimum=0,
        maximum=MAX_HALVINGS,
    )
    num_postprocess_cells: int = key(3, "cells per postprocess block", minimum=1)
    num_cell_per_cond_enc: int = key(1, "encoder cells per latent group", minimum=1)
    num_cell_per_cond_dec: int = key(1, "decoder cells per latent group", minimum=1)
    use_se: bool = key(False, "squeeze-and-excitation at the end of every residual cell")
    res_dist: bool = key(False, "posterior parameters relative to the prior's")
    num_nf: int = key(0, "normalizing-flow cells per latent group", minimum=0)
    num_mixture_dec: int = key(
        10, "logistics in the mixture of a colour pixel; 1: a normal distribution", minimum=1
    )
    latent_stddev: str = key(
        "exp",
        "deviations of latents: exp of what the network says, or softplus with beta ln 2, which grows "
        "linearly (Efficient-VDVAE, Hazami et al., 2022)",
        choices=("exp", "softplus"),
    )
    likelihood: str = key(
        AUTO,
        "probabilities of colour pixels: official (3 channels of at most 8 bits; approximates small "
        "ones, and counts level 255 twice) or exact; auto: official where it applies",
        choices=(AUTO, OFFICIAL, EXACT),
    )
    min_log_scale: float | str = key(
        OFFICIAL,
        "smallest log-scale of the logistics of a colour pixel; official: -7 for at most 8 bits, as in "
        "PixelCNN++ (Salimans et al., 2017); "
        "auto, and official for more bits: as many levels wide as -7 is with 8 bits",
        minimum=-40,
        maximum=0,
        words=(OFFICIAL, AUTO),
    )
    num_x_bits: int | str = key(
        AUTO,
        "bits per colour value that the model sees; auto: those of the images",
        minimum=1,
        maximum=MAX_BITS,
        words=(AUTO,),
    )

    def x_bits(self, image: ImageSpec) -> int:
        """Bits per value that the model sees of images."""
        return image.bits if isinstance(self.num_x_bits, str) else self.num_x_bits

    @property
    def groups_per_scale(self) -> tuple[int, ...]:
        """Number of latent groups of each scale, finest scale first."""
        counts = [self.num_groups_per_scale]
        while len(counts) < self.num_latent_scales:
            halved = max(counts[-1] // 2, self.min_groups_per_scale)
            counts.append(halved if self.ada_groups else counts[-1])
        return tuple(counts)


@dataclass(frozen=True)
class DataConfig(Section):
    """Which images, where they are, and how they are batched."""

    dataset: str = key("mnist", "name of the data set")
    data: str = key("", "folder that holds the data set; empty: the library's own cache")
    image_size: str = key(
        "0",
        "size of the images in pixels, for images, tfrecords and photos: 64, or width x height as "
        "96x64; 0: the data set's own",
        pattern=(r"0|[1-9]\d{0,4}(x[1-9]\d{0,4})?", "a side (64), or width x height (96x64)"),
    )
    channels: int = key(
        0,
        "channels, for images and tfrecords: 1 makes colours grey; 0: those that the files have",
        minimum=0,
        maximum=MAX_CHANNELS,
    )
    bits: int = key(
        0,
        "bits per value, for images and tfrecords; 0: as many as the files need",
        minimum=0,
        maximum=MAX_BITS,
    )
    value_range: str = key(
        AUTO,
        "values in the files that become black and white, for images: MIN,MAX; full: all that their "
        "type allows; auto: 0 to the smallest 2^bits - 1, 255 at least, that holds the largest value, "
        "for floats 0 to 1 or else from the smallest to the largest",
        pattern=(_RANGE, "auto, full or MIN,MAX (0,4095)"),
    )
    alpha: str = key(
        DROP,
        "what becomes of transparency, for images: dropped, laid on white or black, or kept as a "
        "channel",
        choices=ALPHA_MODES,
    )
    flip: bool | str = key(
        AUTO,
        "mirror images at random in training; auto: as is usual for the data set, and never for "
        "images of your own",
        words=(AUTO,),
    )
    strict: bool = key(
        False, "refuse images that are too small or unreadable, instead of skipping them"
    )
    crop: str = key(
        CENTRE,
        "how images of a folder get the shape that is asked for: cut to the centre, or at random "
        "anew on every visit (in evaluation to the centre), or none: squeezed; random also for "
        "tfrecords prepared so",
        choices=CROPS,
    )
    batch_size: int = key(200, "images per replica (GPU) and pass", minimum=1)
    seed: int = key(
        1, "seed of weights, noise, order and augmentation", minimum=0, maximum=LARGEST_INT
    )

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that are asked for; None: the data set's own."""
        if self.image_size == "0":
            return None
        width, _, height = self.image_size.partition("x")
        return int(height or width), int(width)


@dataclass(frozen=True)
class TrainConfig(Section):
    """Objective, optimiser, schedule and what is recorded of a run."""

    epochs: int = key(200, "passes over the training set", minimum=1)
    warmup_epochs: int = key(
        5,
        "epochs of linear learning-rate warm-up; a recipe's own is shortened if fewer epochs are "
        "asked for",
        minimum=0,
    )
    optimizer: str = key(
        "adamax",
        "adamax (as in the official implementation), adam or adamw; with TensorFlow Addons any of its "
        "optimisers, for example lamb, or lookahead around Adamax",
    )
    learning_rate: float = key(1e-2, "learning rate after warm-up", above=0)
    learning_rate_min: float = key(1e-4, "learning rate at the end of the cosine", minimum=0)
    weight_decay: float = key(3e-4, "coefficient of weight decay, on all parameters", minimum=0)
    weight_decay_norm: float = key(
        0.0, "coefficient lambda of the spectral and batch-norm regularisation", minimum=0
    )
    weight_decay_norm_anneal: bool = key(
        False, "anneal lambda, log-linearly, from weight_decay_norm_init to weight_decay_norm"
    )
    weight_decay_norm_init: float = key(10.0, "lambda at the start of its annealing", above=0)
    kl_anneal_portion: float = key(
        0.3, "portion of all steps over which the KL coefficient rises to 1", minimum=0, maximum=1
    )
    kl_const_portion: float = key(
        1e-4, "portion of all steps before the KL coefficient starts to rise", minimum=0, maximum=1
    )
    kl_const_coeff: float = key(
        1e-4, "KL coefficient before it starts to rise", minimum=0, maximum=1
    )
    kl_max_coeff: float = key(
        1.0,
        "KL coefficient at which it stops rising; 0.7 for the VAE of LSGM (Vahdat et al., 2021)",
        above=0,
        maximum=1,
    )
    accumulate_steps: int = key(
        1, "passes whose gradients make one step: batches larger than memory", minimum=1
    )
    precision: str = key(
        "float32",
        "precision of activations; weights, distributions, losses and statistics are float32 always",
        choices=("float32", "mixed_float16", "mixed_bfloat16"),
    )
    jit_compile: str = key(
        "auto",
        "compile the step with XLA; parts: what stands between convolutions and exchanges; auto: on "
        "one GPU the whole step, elsewhere parts",
        choices=("auto", "on", "parts", "off"),
    )
    gradient_checkpointing: str = key(
        "none",
        "recompute activations in the backward pass, to save memory: those of batch norms, or of "
        "whole cells",
        choices=REMAT_MODES,
    )
    deterministic: bool = key(False, "the same weights to the bit from the same seed; slower")
    ema_decay: float = key(
        0.0,
        "decay of moving averages of the weights, used in evaluation (Polyak and Juditsky, 1992); 0: "
        "none",
        minimum=0,
        below=1,
    )
    clip_gradient_norm: float = key(0.0, "largest norm of the gradient; 0: any", minimum=0)
    skip_gradient_norm: float | str = key(
        0.0,
        "a step is skipped if the norm of its gradient is above this (Child, 2021), in nats per unit "
        "of the weights; 0: no step is; auto: above a running bound of our own, at least ten times the "
        "typical norm (nvae_tf/training/norm_bound.py)",
        minimum=0,
        words=(AUTO,),
    )
    max_bad_steps: int = key(
        20, "skipped steps in a row (not finite, or too large) that end training", minimum=1
    )
    save_every: str = key(
        "10m",
        "steps, or minutes as 10m, between checkpoints, besides those at the ends of epochs",
        pattern=(r"[1-9]\d{0,8}m?", "steps (500) or minutes (10m)"),
    )
    log_every: int = key(
        100,
        "steps between training scalars in TensorBoard; each epoch has ten at least",
        minimum=1,
    )
    eval_every: int = key(1, "epochs between validations (the last epoch always is)", minimum=1)
    images_every: int = key(5, "epochs between image grids (the last epoch always is)", minimum=1)
    keep: int = key(3, "checkpoints kept; older ones are removed", minimum=1)


@dataclass(frozen=True)
class Config:
    """One recipe: model, data and training, each key under one flat name."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Every key and its value, in the order of the sections."""
        return {name: getattr(getattr(self, part), name) for name, (part, _) in KEYS.items()}

    def to_yaml(self) -> str:
        """The whole configuration as YAML that `load` reads back."""
        return "\n".join(
            f"# {part}\n" + yaml.safe_dump(dataclasses.asdict(getattr(self, part)), sort_keys=False)
            for part in SECTIONS
        )


SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
KEYS = {f.name: (part, f) for part, section in SECTIONS.items() for f in fields(section)}


class Overridden(NamedTuple):
    """A recipe with some of its keys changed.

    Attributes:
        config: The configuration that results.
        note: A line to print if a key that was not given was changed, too; else None.
    """

    config: Config
    note: str | None


def from_dict(values: dict[str, Any], base: Config | None = None) -> Config:
    """Builds a configuration from flat keys.

    Args:
        values: The value of each key, or the text of the value (``"1e-2"`` for a float).
        base: Configuration that has the values of all other keys; default: every key's default.

    Raises:
        ConfigError: A key is unknown, or a value has the wrong type, is out of range or does not go
            together with another one.
    """
    base = base or Config()
    parts: dict[str, dict[str, Any]] = {part: {} for part in SECTIONS}
    for name, value in values.items():
        checked = check_value(name, value)
        part, _ = KEYS[name]
        parts[part][name] = checked
    config = Config(
        **{part: dataclasses.replace(getattr(base, part), **new) for part, new in parts.items()}
    )
    _check_combinations(config)
    return config


def override(recipe: Config, given: dict[str, Any]) -> Overridden:
    """Changes keys of a recipe, for flags or for the trials of a search.

    If the recipe's warm-up is not shorter than the training, it is shortened to end one epoch before
    it. A warm-up that is given itself has to fit.

    Args:
        recipe: The recipe, as its file has it.
        given: Values of the keys to change, as for `from_dict`.

    Raises:
        ConfigError: As for `from_dict`.
    """
    warmup, given = recipe.train.warmup_epochs, dict(given)
    epochs = check_value("epochs", given.get("epochs", recipe.train.epochs))
    note = None
    if "warmup_epochs" not in given and warmup >= epochs:
        given["warmup_epochs"] = epochs - 1
        note = (
            f"warmup_epochs: {epochs - 1} instead of the recipe's {warmup}, to fit into "
            f"{counted(epochs, 'epoch')}"
        )
    return Overridden(from_dict(given, recipe), note)


def check_value(name: str, value: Any) -> Any:
    """Converts a value to its key's type and checks it.

    Args:
        name: Name of the key.
        value: Value of the key's type, or the text of one.

    Returns:
        The value in the key's type.

    Raises:
        ConfigError: The key is unknown, or the value has the wrong type or is out of range.
    """
    if name not in KEYS:
        near = difflib.get_close_matches(short_repr(name).strip("'"), KEYS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(KEYS)}"
        raise ConfigError(f"unknown configuration key {short_repr(name)}; {hint}")
    return checked(KEYS[name][1], value)


def list_recipes() -> list[str]:
    """The names of the recipes in ``configs/``, in alphabetical order."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name_or_path: str) -> Config:
    """Reads a recipe by its name (``cifar10``) or by the path of a YAML file.

    Args:
        name_or_path: Name of a file in ``configs/`` without its ending, or path of a YAML file.

    Raises:
        ConfigError: There is no such recipe, it is not a YAML mapping, or it has an impossible value.
    """
    recipes = list_recipes()
    path = RECIPES / f"{name_or_path}.yaml" if name_or_path in recipes else user_path(name_or_path)
    if not is_regular(path):
        raise ConfigError(
            f"no configuration {short_repr(name_or_path)}: give the path of a YAML file or one of "
            f"{', '.join(recipes)}"
        )
    try:
        return from_dict(read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def data_override(folder: str | None) -> dict:
    """The key ``data`` for a folder that a user names.

    The path is made absolute, because later commands may run in another working directory.

    Args:
        folder: Path as the user wrote it; None or empty: none was given.

    Returns:
        A dictionary with the key, or an empty one if no folder was given.
    """
    return {"data": str(user_path(folder).resolve())} if folder else {}


def read_yaml(path: Path) -> dict:
    """Reads the mapping in a YAML file.

    Args:
        path: Path of the file.

    Returns:
        The mapping, with every scalar as text, whatever it looks like, and empty values as None.

    Raises:
        ConfigError: The file is missing, is a device or a pipe, or does not hold a mapping.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"more than {LARGEST_FILE} bytes; no recipe is that large")
        if not is_regular(path):
            raise ValueError("not a regular file")
        values = _PlainLoader(path.read_text(encoding="utf-8")).get_single_data()
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - PyYAML lets through what numbers and dates raise
        raise ConfigError(f"not a readable YAML file ({short_message(error)})") from None
    if not isinstance(values, dict):
        raise ConfigError("expected lines of the form 'key: value'")
    return values


def check_image(config: ModelConfig, image: ImageSpec) -> None:
    """Checks that a model fits the images.

    Args:
        config: Configuration of the model.
        image: Description of the images.

    Raises:
        ConfigError: The image cannot be halved as often as the model halves it, has fewer bits than the
            model is to see, or has no likelihood of the kind that the model is to use.
    """
    halvings = config.num_preprocess_blocks + config.num_latent_scales - 1
    if image.height % 2**halvings or image.width % 2**halvings:
        common = math.gcd(image.height, image.width)
        most = int(math.log2(common & -common))
        raise ConfigError(
            f"num_latent_scales: images of {image.size_text} can be halved at most {most} "
            f"times, but num_preprocess_blocks {config.num_preprocess_blocks} + num_latent_scales "
            f"{config.num_latent_scales} - 1 halve them {halvings} times; the nearest sizes for that "
            f"are {_nearest_sizes(image, 2**halvings)}"
        )
    if config.x_bits(image) > image.bits:
        raise ConfigError(
            f"num_x_bits: {config.num_x_bits} is not allowed; the images have {image.bits} bits"
        )
    if config.likelihood == EXACT and config.num_mixture_dec == 1 and not image.binary:
        raise ConfigError(
            "likelihood: exact is not allowed with num_mixture_dec 1, a normal density; expected auto"
        )
    if config.likelihood == OFFICIAL and not has_official_likelihood(config, image):
        raise ConfigError(
            f"likelihood: official is not allowed for {image.channels} channels of "
            f"{config.x_bits(image)} bits; it is for {OFFICIAL_CHANNELS} channels of at most "
            f"{OFFICIAL_BITS} bits"
        )


def has_official_likelihood(config: ModelConfig, image: ImageSpec) -> bool:
    """Whether the official implementation has a likelihood for such images."""
    if image.binary or config.num_mixture_dec == 1:
        return True
    return image.channels == OFFICIAL_CHANNELS and config.x_bits(image) <= OFFICIAL_BITS


def _nearest_sizes(image: ImageSpec, divisor: int) -> str:
    """The next smaller and the next larger size whose sides a number divides, as text."""
    smaller = [max(divisor, side // divisor * divisor) for side in (image.width, image.height)]
    larger = [-(-side // divisor) * divisor for side in (image.width, image.height)]
    sizes = dict.fromkeys("{}x{}".format(*size) for size in (smaller, larger))
    return " and ".join(sizes)


def model_config(config: ModelConfig | None, keys: dict[str, Any]) -> ModelConfig:
    """A model's configuration, with some of its keys changed.

    Args:
        config: The configuration; default: that of `ModelConfig`.
        keys: Values of keys of `ModelConfig`, as for `from_dict`.

    Raises:
        ConfigError: It is another object, or a key or a value is not allowed.
    """
    if config is not None and not isinstance(config, ModelConfig):
        raise ConfigError(f"config: {short_repr(config)} is not allowed; expected a ModelConfig")
    for name in keys:
        if name in KEYS and KEYS[name][0] != "model":
            raise ConfigError(
                f"{name}: is not a key of a model; it belongs to the section {KEYS[name][0]} of "
                "a recipe"
            )
    return from_dict(keys, Config(model=config or ModelConfig())).model


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, without the features that would surprise in a recipe.

    Scalars stay text: YAML 1.1 would read ``off`` as false, ``1:30`` as 90, ``010`` as 8 and ``8_0`` as
    80. The key decides what a text means. A key that is given twice is an error; PyYAML would take the
    last one. Mappings are not merged (``<<``), because a few lines of merges could fill the memory.
    """

    yaml_implicit_resolvers: dict = {}

    def flatten_mapping(self, node):
        """Leaves ``<<`` in place, as an unknown key."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            raise yaml.YAMLError("a key is given twice")
        return mapping


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)


def _check_combinations(config: Config) -> None:
    """Refuses values that are allowed alone but not together."""
    model, train = config.model, config.train
    if model.num_preprocess_blocks != model.num_postprocess_blocks:
        raise ConfigError(
            f"num_postprocess_blocks: {model.num_postprocess_blocks} must equal num_preprocess_blocks "
            f"({model.num_preprocess_blocks}), or the output would not have the image's size",
            keys=("num_postprocess_blocks", "num_preprocess_blocks"),
        )
    if model.arch_instance == "mbconv_den":
        for name in ("num_channels_enc", "num_channels_dec"):
            if getattr(model, name) % 8:
                raise ConfigError(
                    f"{name}: {getattr(model, name)} is not allowed with arch_instance mbconv_den, "
                    "whose convolutions have 8 groups; expected a multiple of 8",
                    keys=(name, "arch_instance"),
                )
    if train.weight_decay_norm_anneal and train.weight_decay_norm == 0:
        raise ConfigError(
            "weight_decay_norm: 0 is not allowed with weight_decay_norm_anneal, which interpolates "
            "logarithms; expected a number above 0",
            keys=("weight_decay_norm", "weight_decay_norm_anneal"),
        )
    if train.kl_const_coeff > train.kl_max_coeff:
        raise ConfigError(
            f"kl_const_coeff: {train.kl_const_coeff} is not allowed; expected at most kl_max_coeff "
            f"({train.kl_max_coeff})",
            keys=("kl_const_coeff", "kl_max_coeff"),
        )
    if train.learning_rate_min > train.learning_rate:
        raise ConfigError(
            f"learning_rate_min: {train.learning_rate_min} is not allowed; expected at most "
            f"learning_rate ({train.learning_rate})",
            keys=("learning_rate_min", "learning_rate"),
        )
    if train.warmup_epochs >= train.epochs:
        raise ConfigError(
            f"warmup_epochs: {train.warmup_epochs} is not allowed; expected less than epochs "
            f"({train.epochs})",
            keys=("warmup_epochs", "epochs"),
        )
