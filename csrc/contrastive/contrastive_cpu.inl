// The kernels, compiled once per instruction set.
#include "contrastive/contrastive_sigmoid.inl"
#include "contrastive/contrastive_stats.inl"
