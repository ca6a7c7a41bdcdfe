// Global memory under the runner: the buffers that a launch may touch. An access that is not wholly inside one of them,
// a store to a buffer that is only read, a load of a byte that nobody wrote, and two blocks of one launch that meet at
// a byte without atomics are faults.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastxattn::simt {

enum class Access { read, write };

struct Buffer {
  std::string name;
  const char* begin = nullptr;
  const char* end = nullptr;
  Access access = Access::read;
  std::vector<uint8_t> written;  // by byte; empty for buffers that are only read
  std::vector<uint32_t> writer;  // by byte: block + 1 of the last plain store of this launch, kAtomic for atomics
  static constexpr uint32_t kAtomic = 0xffffffffu;
};

class Memory {
 public:
  // A buffer kernels read. `bytes` may be 0 and `data` null.
  void read_only(const void* data, size_t bytes, const char* name) { add(data, bytes, name, Access::read, true); }
  // A buffer kernels also write; `initialised`: its content may be read before it is written.
  void writable(void* data, size_t bytes, const char* name, bool initialised = false) {
    add(data, bytes, name, Access::write, initialised);
  }
  void begin_launch();

  // Check one access of the running thread; a fault ends the launch.
  void check_load(const void* p, size_t bytes, bool fresh);
  void check_store(const void* p, size_t bytes);
  void check_atomic(const void* p, size_t bytes);

 private:
  void add(const void* data, size_t bytes, const char* name, Access access, bool initialised);
  Buffer& find(const void* p, size_t bytes, const char* what);

  std::vector<Buffer> buffers_;
  size_t last_ = 0;
};

}  // namespace fastxattn::simt
