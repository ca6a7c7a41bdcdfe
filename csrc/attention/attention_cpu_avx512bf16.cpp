#include "attention/attention_cpu.inl"
