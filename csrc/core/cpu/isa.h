// The instruction sets of isas.def: which of them this library was compiled for, and which one runs.
//
// A kernel body is an .inl file whose code lives in `namespace fastxattn::FXA_ISA`. The build compiles each
// csrc/<op>/<op>_cpu.inl once per instruction set, with that set's flags, FXA_ISA (the namespace) and FXA_ISA_<NAME> of
// it and of its bases. The namespaces keep the linker from picking an AVX-512 copy of an inline function for another
// set. Other files get FXA_ISAS, the sets that kernels exist for.
#pragma once

#include <string>

namespace fastxattn {

#define FXA_ROW(name, machine, base, flags, condition) name,
enum class Isa : int {
#include "core/cpu/isas.def"
};
#undef FXA_ROW

// The name used by FASTXATTN_CPU_ISA and by `fastxattn env`.
const char* isa_name(Isa isa);

// The names of those compiled in and supported by this processor and operating system, slowest first, separated by
// spaces.
std::string available_isas();

// The instruction set kernels run on: the forced one, else the best available.
Isa active_isa();

// Forces an instruction set by name ("" or "auto" lifts it). False when unknown or not available.
bool force_isa(const char* name);

}  // namespace fastxattn

#if !defined(FXA_ISAS)
#define FXA_ISAS(X, ...) X(generic, __VA_ARGS__)
#endif

// Declares a kernel in the namespace of every instruction set, and `<name>_for(isa)`, a pointer to that set's. For use
// in namespace fastxattn: FXA_CPU_KERNEL(void, attention_merge, (const AttentionParams&, const ForwardMerge&, float*))
#define FXA_CPU_KERNEL(result, name, parameters)             \
  FXA_ISAS(FXA_DECLARE_CPU_KERNEL, result, name, parameters) \
  static auto name##_for(Isa isa) -> result(*) parameters {  \
    switch (isa) {                                           \
      FXA_ISAS(FXA_CASE_CPU_KERNEL, name)                    \
      default: return &generic::name;                        \
    }                                                        \
  }
#define FXA_DECLARE_CPU_KERNEL(isa, result, name, parameters) \
  namespace isa {                                             \
  result name parameters;                                     \
  }
#define FXA_CASE_CPU_KERNEL(isa, name) \
  case Isa::isa: return &isa::name;
