#include "pruning/match_cpu.inl"
#include "pruning/select_cpu.inl"
