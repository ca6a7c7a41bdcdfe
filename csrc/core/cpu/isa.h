// Which instruction sets this library was compiled for, and which one runs.
//
// Every kernel body is an .inl file included by one small .cpp per instruction set; setup.py reads the
// suffix of that .cpp (`_generic`, `_neon`, `_avx2`, `_avx512`, `_avx512bf16`, `_amx`), adds the compiler
// flags, and defines FXA_ISA (the namespace) and FXA_ISA_<NAME>. Everything in an .inl lives in
// `namespace fastxattn::FXA_ISA` so that the linker can never pick an AVX-512 copy of an inline function
// for the generic path.
#pragma once

namespace fastxattn {

enum class Isa : int { generic = 0, neon = 1, avx2 = 2, avx512 = 3, avx512bf16 = 4, amx = 5 };

inline constexpr int kIsaCount = 6;

// The name used by FASTXATTN_CPU_ISA and by `fastxattn env`.
const char* isa_name(Isa isa);

// Compiled in and supported by this processor and operating system.
bool isa_available(Isa isa);

// The instruction set kernels run on: the forced one, else the best available.
Isa active_isa();

// Forces an instruction set by name ("" or "auto" lifts it). False when unknown or not available.
bool force_isa(const char* name);

}  // namespace fastxattn

// Picks `fastxattn::<isa>::function` for the active instruction set. A kernel need not be compiled for
// every set: list the ones it has, best last, in FXA_SELECT_* below; `amx` falls back to avx512bf16.
#if defined(FXA_HAVE_AVX2)
#define FXA_CASE_AVX2(fn) \
  case ::fastxattn::Isa::avx2: return &::fastxattn::avx2::fn;
#else
#define FXA_CASE_AVX2(fn)
#endif
#if defined(FXA_HAVE_AVX512)
#define FXA_CASE_AVX512(fn) \
  case ::fastxattn::Isa::avx512: return &::fastxattn::avx512::fn;
#else
#define FXA_CASE_AVX512(fn)
#endif
#if defined(FXA_HAVE_AVX512BF16)
#define FXA_CASE_AVX512BF16(fn) \
  case ::fastxattn::Isa::amx:   \
  case ::fastxattn::Isa::avx512bf16: return &::fastxattn::avx512bf16::fn;
#else
#define FXA_CASE_AVX512BF16(fn)
#endif
#if defined(FXA_HAVE_NEON)
#define FXA_CASE_NEON(fn) \
  case ::fastxattn::Isa::neon: return &::fastxattn::neon::fn;
#else
#define FXA_CASE_NEON(fn)
#endif

// Declares `fn` once per compiled instruction set: FXA_DECLARE(void, attention_forward, (const Params&)).
#define FXA_DECLARE_IN(isa, ret, fn, args) \
  namespace fastxattn::isa {               \
  ret fn args;                             \
  }
#define FXA_DECLARE(ret, fn, args)       \
  FXA_DECLARE_IN(generic, ret, fn, args) \
  FXA_DECLARE_IN(neon, ret, fn, args)    \
  FXA_DECLARE_IN(avx2, ret, fn, args)    \
  FXA_DECLARE_IN(avx512, ret, fn, args)  \
  FXA_DECLARE_IN(avx512bf16, ret, fn, args)

// Body of a function returning the kernel pointer for `isa`.
#define FXA_SELECT(isa, fn)                    \
  switch (isa) {                               \
    FXA_CASE_NEON(fn)                          \
    FXA_CASE_AVX2(fn)                          \
    FXA_CASE_AVX512(fn)                        \
    FXA_CASE_AVX512BF16(fn)                    \
    default: return &::fastxattn::generic::fn; \
  }
