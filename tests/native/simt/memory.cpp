#include "simt/memory.h"

#include <algorithm>
#include <cstdlib>

#include "simt/runner.h"

namespace fastxattn::simt {

// With wrong offsets sequences overlap, blocks write the same rows and others are left out: FXA_SIMT_BOUNDS_ONLY lets
// that pass, to see where accesses go.
static void fault_of_order(const std::string& what) {
  if (std::getenv("FXA_SIMT_BOUNDS_ONLY") == nullptr) Runner::current().fault(what);
}

void Memory::add(const void* data, size_t bytes, const char* name, Access access, bool initialised) {
  if (data == nullptr || bytes == 0) return;
  Buffer b;
  b.name = name;
  b.begin = static_cast<const char*>(data);
  b.end = b.begin + bytes;
  b.access = access;
  if (access == Access::write) {
    b.written.assign(bytes, initialised ? 1 : 0);
    b.writer.assign(bytes, 0);
  }
  buffers_.push_back(std::move(b));
}

void Memory::begin_launch() {
  for (auto& b : buffers_) std::fill(b.writer.begin(), b.writer.end(), 0u);
}

Buffer& Memory::find(const void* p, size_t bytes, const char* what) {
  const auto* begin = static_cast<const char*>(p);
  for (size_t i = 0; i < buffers_.size(); ++i) {
    Buffer& b = buffers_[(last_ + i) % buffers_.size()];
    if (begin >= b.begin && begin + bytes <= b.end) {
      last_ = (last_ + i) % buffers_.size();
      if (reinterpret_cast<uintptr_t>(p) % std::min<size_t>(bytes, 16) != 0 && (bytes & (bytes - 1)) == 0) {
        Runner::current().fault(std::string("misaligned ") + what + " of " + std::to_string(bytes) + " bytes in " +
                                b.name);
      }
      return b;
    }
  }
  std::string nearest = "no buffer";
  int64_t distance = INT64_MAX;
  for (const auto& b : buffers_) {
    const int64_t away = begin < b.begin ? b.begin - begin : begin - b.end;
    if (away < distance) {
      distance = away;
      nearest =
          b.name + " (" + std::to_string(b.end - b.begin) + " bytes) at offset " + std::to_string(begin - b.begin);
    }
  }
  Runner::current().fault(std::string("global memory ") + what + " out of bounds: " + std::to_string(bytes) +
                          " bytes, nearest is " + nearest);
}

void Memory::check_load(const void* p, size_t bytes, bool fresh) {
  Buffer& b = find(p, bytes, "load");
  if (b.access == Access::read) return;
  const uint32_t me = static_cast<uint32_t>(Runner::current().block_number()) + 1;
  const auto first = static_cast<size_t>(static_cast<const char*>(p) - b.begin);
  for (size_t i = first; i < first + bytes; ++i) {
    if (!b.written[i]) fault_of_order("load of uninitialised global memory in " + b.name);
    if (!fresh && b.writer[i] != 0 && b.writer[i] != me) {
      fault_of_order("race between blocks: plain load of what another block wrote in " + b.name);
    }
  }
}

void Memory::check_store(const void* p, size_t bytes) {
  Buffer& b = find(p, bytes, "store");
  if (b.access == Access::read) Runner::current().fault("store to " + b.name + ", which is only read");
  const uint32_t me = static_cast<uint32_t>(Runner::current().block_number()) + 1;
  const auto first = static_cast<size_t>(static_cast<const char*>(p) - b.begin);
  for (size_t i = first; i < first + bytes; ++i) {
    if (b.writer[i] != 0 && b.writer[i] != me) {
      fault_of_order("race between blocks: two blocks write the same byte of " + b.name);
    }
    b.written[i] = 1;
    b.writer[i] = me;
  }
}

void Memory::check_atomic(const void* p, size_t bytes) {
  Buffer& b = find(p, bytes, "atomic");
  if (b.access == Access::read) Runner::current().fault("atomic on " + b.name + ", which is only read");
  const uint32_t me = static_cast<uint32_t>(Runner::current().block_number()) + 1;
  const auto first = static_cast<size_t>(static_cast<const char*>(p) - b.begin);
  for (size_t i = first; i < first + bytes; ++i) {
    if (!b.written[i]) fault_of_order("atomic on uninitialised global memory in " + b.name);
    if (b.writer[i] != 0 && b.writer[i] != me && b.writer[i] != Buffer::kAtomic) {
      fault_of_order("race between blocks: atomic on what another block stored in " + b.name);
    }
    b.writer[i] = Buffer::kAtomic;
  }
}

}  // namespace fastxattn::simt
