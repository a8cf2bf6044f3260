"""What the residual cells of each ``arch_instance`` are made of; knows no TensorFlow.

An operation is ``res_elu``, ``res_bnelu``, ``res_bnswish``, ``res_bnswish5`` (dilated) or
``mconv_e{E}k{K}g{G}``: an inverted bottleneck with E times the channels, kernels of K and G groups (0:
depthwise). `nvae_tf.layers.cells` has the layers.
"""

SWISH = ("res_bnswish", "res_bnswish")
E3, E6 = ("mconv_e3k5g0",), ("mconv_e6k5g0",)


def _cells(preprocess, encoder, decoder, postprocess):
    """The operations in the branch of each kind of cell."""
    return dict(preprocess=preprocess, encoder=encoder, decoder=decoder, postprocess=postprocess)


def _everywhere(operation):
    return _cells(*[(operation, operation)] * 4)


def _residual_encoder(*operations):
    return _cells(operations, operations, E6, E3)


ARCHITECTURES = {
    "res_mbconv": _cells(SWISH, SWISH, E6, E3),
    "res_elu": _everywhere("res_elu"),
    "res_bnelu": _everywhere("res_bnelu"),
    "res_bnswish": _everywhere("res_bnswish"),
    "mbconv_sep": _cells(E3, E6, E6, E3),
    "mbconv_sep11": _cells(E3, ("mconv_e6k11g0",), ("mconv_e6k11g0",), E3),
    "res53_mbconv": _residual_encoder("res_bnswish5", "res_bnswish"),
    "res35_mbconv": _residual_encoder("res_bnswish", "res_bnswish5"),
    "res55_mbconv": _residual_encoder("res_bnswish5", "res_bnswish5"),
    "mbconv_res": _cells(E3, E6, SWISH, SWISH),
    "mbconv_den": _cells(("mconv_e3k5g8",), E6, E6, ("mconv_e3k5g8",)),
}
