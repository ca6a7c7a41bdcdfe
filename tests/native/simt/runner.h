// The SIMT runner: executes a kernel written against core/cuda_device.h, block after block, on one CPU thread.
//
// The threads of a block are fibers that run until they need each other: at a barrier, or at a warp function, where the
// last lane to arrive computes the result for all. What a GPU would leave undefined is a fault (SimtFault): see
// README.md in this folder for the list.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/memory.h"

namespace fastxattn::simt {

struct SimtFault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  int grid_x = 1, grid_y = 1, grid_z = 1;
  int threads = 32;         // per block, a multiple of 32
  size_t shared_bytes = 0;  // dynamic shared memory
  uint64_t order = 0;       // 0: lanes run in order; else the seed of a random order
};

// What the launches of a Runner did, summed. `wavefronts` are the shared-memory passes that the accesses took,
// `ideal` the passes they would take without bank conflicts; by kind of access.
struct Traffic {
  uint64_t wavefronts = 0, ideal = 0;
};
struct Statistics {
  Traffic load, store, ldmatrix, cp_async;
  uint64_t mma = 0;  // warp-level matrix instructions
  uint64_t barriers = 0;
};

// A byte range of shared memory: who touched it last, as far as races need to know.
struct Cell {
  uint32_t write_clock = 0, read_clock = 0, other_clock = 0;
  uint16_t writer = 0, reader = 0, other = 0;  // other: the last reader that is not `reader`
  bool written = false, read = false, read_other = false, atomic = false, in_flight = false;
};
inline constexpr uint32_t kCellBytes = 2;

using WarpOperation = void (*)(int warp, void** operands);  // operands of the 32 lanes

struct Copy {  // a cp.async in flight
  uint32_t to;
  uint8_t bytes;
  uint8_t data[16];
};

struct Thread {
  Fiber fiber;
  enum State : uint8_t { ready, at_warp, at_barrier, left } state = ready;
  const char* where = "";  // what it waits at
  void* operand = nullptr;
  uint32_t clock = 1;            // advances when the thread synchronises
  uint32_t accesses = 0;         // shared accesses since the warp last met, for bank conflicts
  std::vector<Copy> copies;      // in flight, oldest first
  std::vector<uint32_t> groups;  // end of each committed group in `copies`
};

struct Warp {
  uint32_t ready = 0;  // lanes that can run
  int arrived = 0;     // lanes at the current warp function
  WarpOperation operation = nullptr;
  std::vector<uint32_t> known;  // by thread: up to which clock its accesses happened before this warp's next ones
  struct Log {
    uint32_t address[32];
    uint32_t lanes = 0;
    uint8_t bytes = 0;
    Traffic* traffic = nullptr;
  };
  std::vector<Log> logs;  // by access number
  size_t logged = 0;
};

struct Barrier {
  const char* name = nullptr;
  int wanted = 0;
  int arrived = 0;
  int count = 0;  // threads that brought true
  int result = 0;
  std::vector<int> waiting;
};

class Runner {
 public:
  explicit Runner(Memory& memory) : memory_(memory) {}

  // Runs `kernel` once for every thread of the grid. Throws SimtFault.
  void run(const char* name, const Launch& launch, const std::function<void()>& kernel);
  const Statistics& statistics() const { return statistics_; }

  // --- What device.h needs; the running thread calls these.
  static Runner& current() { return *running_; }
  const Launch& launch() const { return launch_; }
  int thread() const { return thread_; }
  int block(int axis) const { return block_[axis]; }
  int block_number() const { return block_number_; }
  Memory& memory() { return memory_; }
  Statistics& counts() { return statistics_; }

  void warp_operation(const char* name, WarpOperation operation, void* operand);
  int barrier(const char* name, int id, int threads, bool value);
  void order_warp();  // what the lanes of this warp did so far happens before what they do next

  char* shared_load(uint32_t offset, uint32_t bytes, int thread, Traffic* traffic);
  char* shared_store(uint32_t offset, uint32_t bytes, Traffic* traffic);
  char* shared_atomic(uint32_t offset, uint32_t bytes);
  void count_matrix_rows(const uint32_t (&rows)[8]);
  void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t valid);
  void commit_copies();
  void wait_copies(uint32_t newest);

  [[noreturn]] void fault(const std::string& what);

 private:
  friend void thread_main();
  void run_block();
  void yield();
  int pick();
  bool happened(uint32_t thread, uint32_t clock, int me) const;
  void check_range(uint32_t offset, uint32_t bytes, const char* what);
  void check_write(Cell& cell, uint32_t offset, bool atomic);
  void log_access(uint32_t offset, uint32_t bytes, Traffic* traffic);
  void settle_logs(Warp& warp);
  std::string deadlock() const;

  static Runner* running_;

  Memory& memory_;
  Statistics statistics_;
  Launch launch_;
  const char* name_ = "";
  const std::function<void()>* kernel_ = nullptr;
  int block_[3] = {0, 0, 0};
  int block_number_ = 0;
  int thread_ = 0;
  int finished_ = 0;
  uint64_t random_ = 0;
  std::string fault_;
  Fiber main_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Barrier barriers_[16];
  std::vector<char> shared_;
  std::vector<Cell> cells_;
};

}  // namespace fastxattn::simt
