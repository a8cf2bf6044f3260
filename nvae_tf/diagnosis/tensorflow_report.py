"""What TensorFlow says of itself and of its devices; a program, since it may crash.

``python -m nvae_tf.diagnosis.tensorflow_report`` prints a JSON object; with ``exchange``, it adds up a
number of every GPU with NCCL, and prints the sum.
"""

import json
import sys

import nvae_tf  # noqa: F401 - sets what TensorFlow reads when it is imported


def report() -> dict:
    """Versions, what TensorFlow was built for, and its GPUs."""
    import tensorflow as tf
    import tf_keras

    build = tf.sysconfig.get_build_info()
    gpus = []
    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        gpus.append([details.get("device_name", gpu.name), details.get("compute_capability")])
    return {
        "tensorflow": tf.__version__,
        "tf_keras": tf_keras.__version__,
        "tf.keras": getattr(tf.keras, "__version__", None) or tf.keras.version(),
        "cuda": build.get("cuda_version") if build.get("is_cuda_build") else None,
        "cudnn": build.get("cudnn_version"),
        "gpus": gpus,
    }


def exchange() -> float:
    """The sum over all GPUs of a number that each has, through `tf.distribute`."""
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    names = [device.name for device in tf.config.list_logical_devices("GPU")]
    strategy = tf.distribute.MirroredStrategy([name.removeprefix("/device:") for name in names])

    @tf.function(autograph=False)
    def run():
        def add():
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.ones(()))

        return strategy.experimental_local_results(strategy.run(add))[0]

    return float(run())


if __name__ == "__main__":
    print(json.dumps(exchange() if sys.argv[1:] == ["exchange"] else report()))
