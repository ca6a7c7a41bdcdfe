#include "core/cpu/peak_cpu.inl"
