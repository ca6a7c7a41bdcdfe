#include "context_attention/context_attention_backward.inl"
#include "context_attention/context_attention_forward.inl"
