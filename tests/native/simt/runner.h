// The SIMT runner: executes a kernel written against core/cuda/device.h, block after block, on one CPU thread.
//
// The threads of a block are fibers that run until they need each other: at a barrier, or at a warp function, where the
// last lane to arrive computes the result for all. What a GPU would leave undefined is a fault (SimtFault): see
// README.md in this folder for the list.
#pragma once

#include <array>
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
  uint64_t wgmma = 0;  // matrix instructions of warp groups
  uint64_t tma = 0;    // tile copies
};

// Agents write shared memory: the threads, then the copies of each mbarrier, whose clock is its phase.
inline constexpr size_t kMostMbarriers = 64;
using Known = std::shared_ptr<const std::vector<uint32_t>>;  // by agent: up to which clock its writes are known

// A byte range of shared memory: who touched it last, as far as races need to know.
struct Cell {
  uint32_t write_clock = 0, read_clock = 0, other_clock = 0;
  uint16_t writer = 0, reader = 0, other = 0;  // other: the last reader that is not `reader`
  bool written = false, read = false, read_other = false, atomic = false;
  bool async = false;     // written by the TMA unit, not by a thread
  bool mbarrier = false;  // part of one
  enum : uint8_t { landed, cp_async, tma } in_flight = landed;
};
inline constexpr uint32_t kCellBytes = 2;

inline std::string number(uint64_t n) { return std::to_string(n); }

using WarpOperation = void (*)(int warp, void** operands);  // operands of its 32 lanes, or of its group's 128

struct Copy {  // a cp.async in flight
  uint32_t to;
  uint8_t bytes;
  uint8_t data[16];
};

// Registers that wgmma works on: what the kernel sees, and what it will see once it has waited.
struct AsyncRegisters {
  char* visible = nullptr;
  char* results = nullptr;  // null: they are only read
  size_t bytes = 0;
  uint32_t group = 0;    // the last one that works on them, 0: none
  uint32_t touched = 0;  // the thread's wgmma_fence count when the kernel last used them
};

struct Thread {
  Fiber fiber;
  enum State : uint8_t { ready, at_warp, at_barrier, at_mbarrier, left } state = ready;
  const char* where = "";  // what it waits at
  void* operand = nullptr;
  uint32_t clock = 1;            // advances when the thread synchronises
  uint32_t accesses = 0;         // shared accesses since the warp last met, for bank conflicts
  std::vector<Copy> copies;      // in flight, oldest first
  std::vector<uint32_t> groups;  // end of each committed group in `copies`
  Known known;
  std::vector<uint32_t> fences;       // clocks at which it made its writes known to the TMA unit and wgmma
  std::vector<AsyncRegisters*> busy;  // that wgmma works on
  uint32_t wgmma_fences = 0;
};

struct Warp {
  uint32_t ready = 0;  // lanes that can run
  int arrived = 0;     // lanes at the current warp function
  WarpOperation operation = nullptr;
  uint32_t committed = 0, completed = 0;           // groups of wgmma, numbered from 1
  std::vector<std::array<uint32_t, 32>> finished;  // by group: the lanes' clocks when they had waited for it
  struct Log {
    uint32_t address[32];
    uint32_t lanes = 0;
    uint8_t bytes = 0;
    Traffic* traffic = nullptr;
  };
  std::vector<Log> logs;  // by access number
  size_t logged = 0;
};

struct WarpGroup {
  const char* name = nullptr;
  int arrived = 0;  // warps at the current function of the group
  WarpOperation operation = nullptr;
  int registers = 0;  // per thread, 0: as launched
};

struct Mbarrier {
  uint32_t offset = 0;
  int arrivals = 0, pending = 0;  // expected in each phase; still missing in this one
  int64_t bytes = 0;              // announced and not there yet
  uint32_t phase = 0;
  int initialiser = 0;
  uint32_t init_clock = 0;
  std::vector<uint32_t> gathered;  // what those who arrived knew
  Known released;                  // the same of the last phase that is over
  std::vector<int> waiting;
};

struct BulkCopy {  // by the TMA unit, in flight
  uint32_t to;
  size_t mbarrier;
  std::vector<char> data;
};

struct Barrier {
  const char* name = nullptr;
  int needed = 0;
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

  void warp_operation(const char* name, WarpOperation operation, void* operand, bool by_group = false);
  int barrier(const char* name, int id, int threads, bool value);
  void order_warp();  // what the lanes of this warp did so far happens before what they do next

  char* shared_load(uint32_t offset, uint32_t bytes, int thread, Traffic* traffic);
  char* shared_store(uint32_t offset, uint32_t bytes, Traffic* traffic);
  char* shared_atomic(uint32_t offset, uint32_t bytes);
  void count_matrix_rows(const uint32_t (&rows)[8]);
  void copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t valid);
  void commit_copies();
  void wait_copies(uint32_t newest);

  // async.cpp
  void mbarrier_init(uint32_t offset, int arrivals);
  void mbarrier_arrive(uint32_t offset, int bytes);
  void mbarrier_wait(uint32_t offset, uint32_t parity);
  void fence_async();
  void copy_bulk(uint32_t to, uint32_t mbarrier, std::vector<char> data);
  void use_registers(AsyncRegisters& registers);
  void busy_registers(AsyncRegisters& registers);
  void drop_registers(const AsyncRegisters& registers);
  void wgmma_fence(int warp);
  void wgmma_commit(int warp);
  void wgmma_wait(int warp, uint32_t newest);
  const char* matrix_read(uint32_t offset, const std::vector<uint32_t>& known, int group);  // 16 bytes
  std::vector<uint32_t> known_to_group(int group) const;
  void set_registers(int group, int count, bool grow);

  [[noreturn]] void fault(const std::string& what);

 private:
  friend void thread_main();
  void run_block();
  void yield();
  int pick();
  static Known merged(const Known& a, const Known& b);
  template <class Threads>
  Known meet(const Threads& who);
  bool happened(uint32_t agent, uint32_t clock, int me) const;
  bool is_fenced(uint32_t writer, uint32_t clock, const std::vector<uint32_t>& known) const;
  std::string writer_of(const Cell& cell) const;
  std::string filling(const Cell& cell) const;
  void check_matrix_reads(uint32_t offset, uint32_t bytes);
  size_t find_mbarrier(uint32_t offset, const char* what);
  void settle(Mbarrier& b);
  bool land_copy();
  int launched_registers() const;
  std::string unfinished() const;
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
  std::vector<WarpGroup> groups_;
  Barrier barriers_[16];
  std::vector<Mbarrier> mbarriers_;
  std::vector<BulkCopy> bulk_;
  std::vector<uint32_t> matrix_reads_;  // by 16 bytes and warp: the group of wgmma that last read them, 0: none
  std::vector<char> shared_;
  std::vector<Cell> cells_;
};

}  // namespace fastxattn::simt
