"""Tests in a child process whether XLA works here, because a failure may end the process.

Run as a program, this module compiles and runs a tiny training step on every GPU, or else on the CPU.
"""

import json
import re

from nvae_tf.io.child_process import run_module

SECONDS = 300.0  # time limit for the child, which has to import TensorFlow and compile


def xla_problem(seconds: float = SECONDS) -> str | None:
    """Why XLA cannot compile here, as part of a line; None if it can.

    Call this before the process uses its GPUs: afterwards, too little of their memory may be left for
    the child.

    Args:
        seconds: Time limit in seconds.
    """
    return run_module(__name__, seconds=seconds).problem


def probe(jit_compile: str, in_use: bool = False) -> str | None:
    """`xla_problem` if steps are to be compiled for a GPU; otherwise None, without a child process.

    Args:
        jit_compile: The configuration's value.
        in_use: Whether this process may have used its GPUs already. It may then hold their memory, so
            that a child which runs out of memory proves nothing, and is ignored.
    """
    from nvae_tf.engine.devices import gpu_found

    if jit_compile == "off" or not gpu_found():
        return None
    problem = xla_problem()
    if problem and in_use and re.search("memory|RESOURCE_EXHAUSTED", problem):
        return None
    return problem


def main() -> None:
    """Compiles and runs a step of a convolution on each device; prints the devices' names."""
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)

    @tf.function(autograph=False, jit_compile=True)
    def step(images, kernel, seed):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            maps = tf.nn.swish(tf.nn.conv2d(images, kernel, 1, "SAME"))
            loss = tf.reduce_mean(maps * tf.random.stateless_normal(maps.shape, seed))
        return kernel - tape.gradient(loss, kernel)

    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    for device in devices:
        with tf.device(device.name):
            kernel = step(tf.ones((2, 8, 8, 3)), tf.ones((3, 3, 3, 4)), tf.constant([1, 0]))
        if not tf.reduce_all(tf.math.is_finite(kernel)):
            raise ArithmeticError(
                f"{device.name}: a compiled step gives values that are not finite"
            )
    print(json.dumps([device.name for device in devices]))


if __name__ == "__main__":
    main()
