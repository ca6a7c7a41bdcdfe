#include "core/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>

namespace fastxattn {
namespace {

#define FXA_ROW(name, machine, base, flags, condition) #name,
constexpr const char* kNames[] = {
#include "core/cpu/isas.def"
};
#undef FXA_ROW
constexpr int kCount = std::size(kNames);

bool compiled(Isa isa) {
  switch (isa) {
#define FXA_CASE(name, ...) \
  case Isa::name: return true;
    FXA_ISAS(FXA_CASE)
    default: return false;
  }
}

#if defined(__x86_64__)
#define FXA_CPU(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define FXA_CPU(feature) false
#endif

bool supported(Isa isa) {
  switch (isa) {
#define FXA_ROW(name, machine, base, flags, condition) \
  case Isa::name: return (Isa::base == Isa::generic || supported(Isa::base)) && (condition);
#include "core/cpu/isas.def"
#undef FXA_ROW
  }
  return false;
}

bool available(int isa) { return compiled(static_cast<Isa>(isa)) && supported(static_cast<Isa>(isa)); }

int best() {
  int isa = kCount - 1;
  while (isa > 0 && !available(isa)) --isa;
  return isa;
}

std::atomic<int> g_active{-1};

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::string available_isas() {
  std::string names = kNames[0];
  for (int isa = 1; isa < kCount; ++isa) {
    if (available(isa)) names += std::string(" ") + kNames[isa];
  }
  return names;
}

bool force_isa(const char* name) {
  if (name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0) {
    g_active.store(best());
    return true;
  }
  for (int isa = 0; isa < kCount; ++isa) {
    if (std::strcmp(name, kNames[isa]) == 0 && available(isa)) {
      g_active.store(isa);
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
