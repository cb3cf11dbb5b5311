"""Fused operators: functions of tensors, each next to its reference in plain PyTorch."""

from fastgan.ops._conv import ACTIVATIONS
from fastgan.ops.batch_norm_act_noise import batch_norm_act_noise
from fastgan.ops.conv2d_bn_act import conv2d_act, conv2d_bn_act
from fastgan.ops.conv_transpose2d_bn_act import conv_transpose2d_act, conv_transpose2d_bn_act
from fastgan.ops.softmax_entropy import softmax_entropy, softmax_entropy_cross_entropy

__all__ = [
    "ACTIVATIONS",
    "batch_norm_act_noise",
    "conv2d_act",
    "conv2d_bn_act",
    "conv_transpose2d_act",
    "conv_transpose2d_bn_act",
    "softmax_entropy",
    "softmax_entropy_cross_entropy",
]
