#include "importance/importance_cpu.inl"
