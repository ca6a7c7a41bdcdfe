// The one entry of the SIMT module: runs a bound function by name, for build.py over ctypes.
#include <mutex>

#include "simt/bind.h"

// Returns null, or what went wrong; `counts` gets wavefronts and ideal of load, store, ldmatrix and cp.async, then the
// matrix instructions of warps, the barriers, the matrix instructions of warp groups and the tile copies.
extern "C" __attribute__((visibility("default"))) const char* fxa_simt_call(const char* name,
                                                                            const fastxattn::simt::Argument* arguments,
                                                                            int count, uint64_t* counts) {
  using namespace fastxattn::simt;
  static std::mutex one_at_a_time;
  static std::string message;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  try {
    const auto found = bindings().find(name);
    if (found == bindings().end()) throw SimtFault(std::string("no bind_*.cpp has ") + name);
    const Statistics s = found->second(Arguments(arguments, count));
    const uint64_t values[] = {s.load.wavefronts,
                               s.load.ideal,
                               s.store.wavefronts,
                               s.store.ideal,
                               s.ldmatrix.wavefronts,
                               s.ldmatrix.ideal,
                               s.cp_async.wavefronts,
                               s.cp_async.ideal,
                               s.mma,
                               s.barriers,
                               s.wgmma,
                               s.tma};
    std::memcpy(counts, values, sizeof(values));
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
