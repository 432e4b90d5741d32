"""The fused operations that the layers stand on; on a CPU each is its plain torch reference.

A public function here has one name on every device; `backend` names the implementation, None stands for the kernel
on a GPU and the reference on a CPU.
"""

from megapoly_kernels.activation import bias_gelu, gated_activation
from megapoly_kernels.adamw import Range, RangeTable, adamw_, merged, squared_norm
from megapoly_kernels.backends import Backends, choose
from megapoly_kernels.context_attention import Exchange, LocalChunks, context_attention
from megapoly_kernels.cross_entropy import vocab_parallel_cross_entropy
from megapoly_kernels.dropout import dropout
from megapoly_kernels.layer_norm import layer_norm
from megapoly_kernels.linear_cross_entropy import linear_cross_entropy
from megapoly_kernels.rms_norm import rms_norm
from megapoly_kernels.rotary import rotary, rotary_table
from megapoly_kernels.rotary_attention import HeadShape, Sequences, rotary_attention

__all__ = [
    "Backends",
    "Exchange",
    "HeadShape",
    "LocalChunks",
    "Range",
    "RangeTable",
    "Sequences",
    "adamw_",
    "bias_gelu",
    "choose",
    "context_attention",
    "dropout",
    "gated_activation",
    "layer_norm",
    "linear_cross_entropy",
    "merged",
    "rms_norm",
    "rotary",
    "rotary_attention",
    "rotary_table",
    "squared_norm",
    "vocab_parallel_cross_entropy",
]
