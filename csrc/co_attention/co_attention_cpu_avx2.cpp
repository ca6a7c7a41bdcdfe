#include "co_attention/co_attention_cpu.inl"
