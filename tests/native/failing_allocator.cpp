// Preloaded, makes one allocation of at least `least` bytes fail: the one after `after` others. Everything that kernels
// and torch's CPU allocator ask with is here.
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <new>

namespace {

std::atomic<long> left{-1};  // allocations that still succeed; negative: all do
std::atomic<bool> failed{false};
size_t smallest = 0;
bool spare_main = false;  // allocations of the first thread always succeed, all others of `smallest` bytes fail

bool fails(size_t bytes) {
  if (bytes < smallest || left.load(std::memory_order_relaxed) < 0) return false;
  if (spare_main) {
    if (syscall(SYS_gettid) == getpid()) return false;
  } else if (left.fetch_sub(1) != 0) {
    return false;
  }
  failed = true;
  return true;
}

void* checked(size_t bytes) {
  void* memory = fails(bytes) ? nullptr : std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

template <class F>
F* next(const char* name) {
  return reinterpret_cast<F*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {
void fail_allocation(long after, size_t least, int not_in_main) {
  failed = false;
  smallest = least;
  spare_main = not_in_main != 0;
  left = after;
}

// Lets all allocations succeed again; whether one has failed.
int stop_failing() {
  left = -1;
  return failed;
}

void* aligned_alloc(size_t alignment, size_t bytes) {
  static auto* const real = next<void*(size_t, size_t)>("aligned_alloc");
  return fails(bytes) ? nullptr : real(alignment, bytes);
}

int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  static auto* const real = next<int(void**, size_t, size_t)>("posix_memalign");
  return fails(bytes) ? ENOMEM : real(memory, alignment, bytes);
}
}

void* operator new(size_t bytes) { return checked(bytes); }
void* operator new[](size_t bytes) { return checked(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
