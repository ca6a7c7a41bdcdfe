#include "late_interaction/late_interaction_cpu.inl"
