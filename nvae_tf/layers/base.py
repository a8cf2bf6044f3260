"""What all layers have in common."""

import tf_keras


class Layer(tf_keras.layers.Layer):
    """A Keras layer that computes in the precision of its inputs, whatever the policy in force."""

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)
