#include "contrastive/sigmoid_cpu.inl"
#include "contrastive/stats_cpu.inl"
