// What the Python loader asks the CPU library about itself, over ctypes.
#include "core/isa.h"

#define FXA_EXPORT extern "C" __attribute__((visibility("default")))

// The active instruction set's name.
FXA_EXPORT const char* fastxattn_cpu_isa() { return fastxattn::isa_name(fastxattn::active_isa()); }

// Forces an instruction set ("auto" lifts it); 0 when it is unknown, not compiled in, or not supported here.
FXA_EXPORT int fastxattn_force_cpu_isa(const char* name) { return fastxattn::force_isa(name) ? 1 : 0; }

// Whether the named instruction set could be forced.
FXA_EXPORT int fastxattn_cpu_isa_available(int isa) {
  return isa >= 0 && isa < fastxattn::kIsaCount && fastxattn::isa_available(static_cast<fastxattn::Isa>(isa)) ? 1 : 0;
}
