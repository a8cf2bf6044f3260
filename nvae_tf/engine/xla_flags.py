"""The environment variable that XLA reads on its first use. Does not import TensorFlow."""

from collections.abc import Mapping, MutableMapping

from nvae_tf.io.errors import ConfigError

VARIABLE = "XLA_FLAGS"
# No operations whose order of summation varies, and no algorithms chosen by timing, since a restart may
# choose others. TensorFlow's own determinism asks XLA for the first of these only.
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")


def make_deterministic(environment: MutableMapping[str, str]) -> None:
    """Sets XLA's flags so that every process computes the same bits on GPUs of one model.

    Args:
        environment: The environment variables of a process that has not used XLA yet. Flags that the
            user has set are kept and take precedence; `check_deterministic` refuses other values.
    """
    given = environment.get(VARIABLE, "").split()
    environment[VARIABLE] = " ".join([*(f for f in DETERMINISTIC if f not in given), *given])


def check_deterministic(environment: Mapping[str, str]) -> None:
    """Checks that XLA's flags make every process compute the same bits on GPUs of one model.

    Args:
        environment: The environment variables.

    Raises:
        ConfigError: One of the flags is not set, or is set to another value.
    """
    # If a flag is given several times, its last value counts, as for XLA.
    needed, given = (
        dict(flag.split("=", 1) for flag in flags if "=" in flag)
        for flags in (DETERMINISTIC, environment.get(VARIABLE, "").split())
    )
    if not needed.items() <= given.items():
        raise ConfigError(
            f"deterministic: compiled steps on GPUs need {VARIABLE}='{' '.join(DETERMINISTIC)}' in the "
            "environment before TensorFlow is imported; set it, or jit_compile: off"
        )
