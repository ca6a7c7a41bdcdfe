// What the CPU and the CUDA operator of attention share.
#pragma once

#include "attention/attention_arguments.h"
#include "bindings/ort_op.h"

namespace fastxattn::ort {

// The problem that a node's inputs and attributes pose, without its outputs. Types, shapes and attributes are checked;
// the contents of offsets, lengths and indices are not, which may lie on a device.
AttentionParams attention_problem(const Call& call);

}  // namespace fastxattn::ort
