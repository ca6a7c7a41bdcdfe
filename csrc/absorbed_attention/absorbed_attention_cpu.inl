// The kernels, compiled once per instruction set.
#include "absorbed_attention/absorbed_attention_backward.inl"
#include "absorbed_attention/absorbed_attention_forward.inl"
