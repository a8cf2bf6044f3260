"""The command ``nvae-prepare``, which is `nvae_tf.data.prepare`."""

from nvae_tf.cli.chatter import keep_out


def main() -> int:
    """Prepares a data set; returns the exit status."""
    keep_out()  # before TensorFlow is imported
    from nvae_tf.data import prepare

    return prepare.main()
