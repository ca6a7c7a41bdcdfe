#include "core/peak_cpu.inl"
