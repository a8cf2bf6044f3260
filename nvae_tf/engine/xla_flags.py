"""What XLA reads from the environment when it is first used; knows no TensorFlow."""

from collections.abc import Mapping, MutableMapping

from nvae_tf.io.errors import ConfigError

VARIABLE = "XLA_FLAGS"
# No operations that add up in another order each time; and no algorithms chosen by their speed, which
# may be others after a restart. TensorFlow's own determinism asks XLA for the former alone.
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")


def make_deterministic(environment: MutableMapping[str, str]) -> None:
    """Lets XLA compute the same bits in every process on GPUs of one kind.

    Args:
        environment: The environment variables, of a process that has not used XLA yet. What the user
            has set there stays, and prevails.
    """
    given = environment.get(VARIABLE, "").split()
    environment[VARIABLE] = " ".join([*(f for f in DETERMINISTIC if f not in given), *given])


def check_deterministic(environment: Mapping[str, str]) -> None:
    """Makes sure that XLA computes the same bits in every process, on GPUs.

    Args:
        environment: The environment variables.

    Raises:
        ConfigError: They do not say so.
    """
    needed, given = (
        {flag.partition("=")[0] for flag in flags}
        for flags in (DETERMINISTIC, environment.get(VARIABLE, "").split())
    )
    if not needed <= given:
        raise ConfigError(
            f"deterministic: compiled steps on GPUs need {VARIABLE}='{' '.join(DETERMINISTIC)}' in the "
            "environment before TensorFlow is imported; set it, or jit_compile: off"
        )
