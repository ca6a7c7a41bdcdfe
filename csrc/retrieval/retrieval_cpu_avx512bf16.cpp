#include "retrieval/retrieval_cpu.inl"
