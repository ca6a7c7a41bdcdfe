#include "core/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastxattn {
namespace {

constexpr const char* kNames[kIsaCount] = {"generic", "neon", "avx2", "avx512", "avx512bf16", "amx"};

bool compiled(Isa isa) {
  switch (isa) {
    case Isa::generic: return true;
#if defined(FXA_HAVE_NEON)
    case Isa::neon: return true;
#endif
#if defined(FXA_HAVE_AVX2)
    case Isa::avx2: return true;
#endif
#if defined(FXA_HAVE_AVX512)
    case Isa::avx512: return true;
#endif
#if defined(FXA_HAVE_AVX512BF16)
    case Isa::avx512bf16: return true;
#endif
#if defined(FXA_HAVE_AMX)
    case Isa::amx: return true;
#endif
    default: return false;
  }
}

#if defined(__x86_64__)
// AMX tiles are off until a Linux process asks for them (arch_prctl ARCH_REQ_XCOMP_PERM, feature 18).
bool amx_permitted() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

bool amx_bf16_in_cpuid() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
}
#endif

bool supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512bf16: return bf16;
    case Isa::amx: return bf16 && amx_bf16_in_cpuid() && amx_permitted();
    default: return false;
  }
#elif defined(__aarch64__)
  return isa == Isa::generic || isa == Isa::neon;
#else
  return isa == Isa::generic;
#endif
}

Isa best() {
  for (int i = kIsaCount - 1; i > 0; --i) {
    if (isa_available(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  return Isa::generic;
}

std::atomic<int> g_active{-1};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) { return compiled(isa) && supported(isa); }

bool force_isa(const char* name) {
  if (name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0) {
    g_active.store(static_cast<int>(best()));
    return true;
  }
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0 && isa_available(static_cast<Isa>(i))) {
      g_active.store(i);
      return true;
    }
  }
  return false;
}

Isa active_isa() {
  int isa = g_active.load(std::memory_order_relaxed);
  if (isa < 0) {
    // A wrong FASTXATTN_CPU_ISA is reported by the Python loader, which can raise; here the best set runs.
    if (!force_isa(std::getenv("FASTXATTN_CPU_ISA"))) force_isa("auto");
    isa = g_active.load(std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

}  // namespace fastxattn
