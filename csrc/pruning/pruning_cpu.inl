// The kernels, compiled once per instruction set.
#include "pruning/pruning_match.inl"
#include "pruning/pruning_select.inl"
