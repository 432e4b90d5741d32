"""The fused operations that the layers stand on; on a CPU each is its plain torch reference.

A public function here has one name on every device: callers never choose an implementation.
"""

from megapoly_kernels.activation import bias_gelu, gated_activation
from megapoly_kernels.adamw import adamw_
from megapoly_kernels.cross_entropy import vocab_parallel_cross_entropy
from megapoly_kernels.layer_norm import layer_norm
from megapoly_kernels.rms_norm import rms_norm
from megapoly_kernels.rotary import rotary, rotary_table
from megapoly_kernels.rotary_attention import rotary_attention

__all__ = [
    "adamw_",
    "bias_gelu",
    "gated_activation",
    "layer_norm",
    "rms_norm",
    "rotary",
    "rotary_attention",
    "rotary_table",
    "vocab_parallel_cross_entropy",
]
