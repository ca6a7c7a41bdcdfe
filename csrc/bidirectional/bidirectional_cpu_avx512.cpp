#include "bidirectional/bidirectional_cpu.inl"
