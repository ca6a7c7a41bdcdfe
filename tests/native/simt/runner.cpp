#include "simt/runner.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
asm(R"(
.text
.globl fxa_simt_switch
.hidden fxa_simt_switch
.type fxa_simt_switch, @function
fxa_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fxa_simt_switch, .-fxa_simt_switch
)");
#endif

namespace fastxattn::simt {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr uint64_t kCanary = 0x5afe57ac5afe57acull;

// Stacks live as long as the process; the lowest word of each tells whether it overflowed.
char* stack_of(int thread) {
  static std::vector<char*> stacks;
  while (static_cast<int>(stacks.size()) <= thread) {
    void* p = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<char*>(p));
  }
  return stacks[static_cast<size_t>(thread)];
}

std::string number(uint64_t n) { return std::to_string(n); }

}  // namespace

Runner* Runner::running_ = nullptr;

void thread_main() {
  Runner& r = Runner::current();
  (*r.kernel_)();
  Thread& me = r.threads_[static_cast<size_t>(r.thread_)];
  me.state = Thread::left;
  ++r.finished_;
  r.yield();  // never comes back
  __builtin_unreachable();
}

void Runner::run(const char* name, const Launch& launch, const std::function<void()>& kernel) {
  if (launch.threads <= 0 || launch.threads > 1024 || launch.threads % 32 != 0) {
    throw SimtFault(std::string(name) + ": a block must have 32..1024 threads in whole warps, got " +
                    std::to_string(launch.threads));
  }
  if (launch.shared_bytes > 227 * 1024) {
    throw SimtFault(std::string(name) + ": more shared memory than any device has: " + number(launch.shared_bytes));
  }
  launch_ = launch;
  name_ = name;
  kernel_ = &kernel;
  random_ = launch.order;
  memory_.begin_launch();
  Runner* before = running_;
  running_ = this;
  block_number_ = 0;
  for (block_[2] = 0; block_[2] < launch.grid_z; ++block_[2]) {
    for (block_[1] = 0; block_[1] < launch.grid_y; ++block_[1]) {
      for (block_[0] = 0; block_[0] < launch.grid_x; ++block_[0], ++block_number_) run_block();
    }
  }
  running_ = before;
}

void Runner::run_block() {
  const auto n = static_cast<size_t>(launch_.threads);
  // Whatever the last block left in shared memory is garbage to this one.
  shared_.assign((launch_.shared_bytes + 15) / 16 * 16, static_cast<char>(0xff));
  cells_.assign(shared_.size() / kCellBytes, Cell{});
  threads_.resize(n);
  warps_.resize(n / 32);
  for (auto& barrier : barriers_) barrier = Barrier{};
  for (auto& warp : warps_) {
    warp.ready = 0xffffffffu;
    warp.arrived = 0;
    warp.known.assign(n, 0);
    for (auto& log : warp.logs) log.lanes = 0;
    warp.logged = 0;
  }
  for (size_t i = 0; i < n; ++i) {
    Thread& t = threads_[i];
    t.state = Thread::ready;
    t.clock = 1;
    t.accesses = 0;
    t.copies.clear();
    t.groups.clear();
    char* stack = stack_of(static_cast<int>(i));
    std::memcpy(stack, &kCanary, sizeof(kCanary));
    t.fiber.prepare(stack, kStackBytes, &thread_main);
  }
  finished_ = 0;
  fault_.clear();
  thread_ = pick();
  Fiber::swap(main_, threads_[static_cast<size_t>(thread_)].fiber);
  if (fault_.empty() && finished_ < launch_.threads) fault_ = deadlock();
  for (size_t i = 0; i < n && fault_.empty(); ++i) {
    if (std::memcmp(stack_of(static_cast<int>(i)), &kCanary, sizeof(kCanary)) != 0) {
      fault_ = std::string(name_) + ": a thread's stack overflowed";
    }
  }
  for (auto& warp : warps_) settle_logs(warp);
  if (!fault_.empty()) {
    running_ = nullptr;
    throw SimtFault(fault_);
  }
}

// The next thread to run: of the running warp first, so that its lanes meet; -1 when all wait or have left.
int Runner::pick() {
  const int warps = static_cast<int>(warps_.size());
  int first = thread_ / 32 < warps ? thread_ / 32 : 0;
  if (random_ != 0) {
    random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
    if ((random_ >> 60) == 0) first = static_cast<int>((random_ >> 33) % static_cast<uint64_t>(warps));
  }
  for (int i = 0; i < warps; ++i) {
    const int w = first + i < warps ? first + i : first + i - warps;
    uint32_t ready = warps_[static_cast<size_t>(w)].ready;
    if (ready == 0) continue;
    if (random_ != 0) {
      const int turn = static_cast<int>((random_ >> 40) & 31u);
      return w * 32 + ((std::countr_zero(std::rotr(ready, turn)) + turn) & 31);
    }
    return w * 32 + std::countr_zero(ready);
  }
  return -1;
}

// Leaves the running thread, whose state says why, for the next one.
void Runner::yield() {
  const auto me = static_cast<size_t>(thread_);
  warps_[me / 32].ready &= ~(1u << (me % 32));
  const int next = pick();
  if (next == thread_) return;
  if (next < 0) {
    Fiber::swap(threads_[me].fiber, main_);
  } else {
    thread_ = next;
    Fiber::swap(threads_[me].fiber, threads_[static_cast<size_t>(next)].fiber);
  }
  thread_ = static_cast<int>(me);
}

void Runner::fault(const std::string& what) {
  fault_ = std::string(name_) + ", block " + number(static_cast<uint64_t>(block_number_)) + ", thread " +
           number(static_cast<uint64_t>(thread_)) + ": " + what;
  Fiber::swap(threads_[static_cast<size_t>(thread_)].fiber, main_);
  __builtin_unreachable();
}

std::string Runner::deadlock() const {
  std::string text = std::string(name_) + ", block " + number(static_cast<uint64_t>(block_number_)) +
                     ": divergent barrier: threads wait for each other in different places:";
  std::vector<std::pair<std::string, std::vector<size_t>>> places;
  for (size_t i = 0; i < threads_.size(); ++i) {
    const std::string where = threads_[i].state == Thread::left ? "left the kernel" : threads_[i].where;
    auto found = std::find_if(places.begin(), places.end(), [&](const auto& p) { return p.first == where; });
    if (found == places.end()) found = places.insert(places.end(), {where, {}});
    found->second.push_back(i);
  }
  for (const auto& [where, who] : places) {
    text += " " + number(who.size()) + " at '" + where + "' (first: thread " + number(who.front()) + ");";
  }
  return text;
}

void Runner::warp_operation(const char* name, WarpOperation operation, void* operand) {
  const auto me = static_cast<size_t>(thread_);
  Warp& warp = warps_[me / 32];
  Thread& t = threads_[me];
  t.where = name;
  t.operand = operand;
  if (warp.arrived != 0 && warp.operation != operation) {
    const size_t first = me / 32 * 32;
    std::string other;
    for (size_t i = first; i < first + 32; ++i) {
      if (threads_[i].state == Thread::at_warp) other = threads_[i].where;
    }
    fault(std::string("divergent warp: it came to ") + name + " while lanes of its warp wait at " + other);
  }
  warp.operation = operation;
  if (++warp.arrived < 32) {
    t.state = Thread::at_warp;
    yield();
    return;
  }
  void* operands[32];
  const size_t first = me / 32 * 32;
  for (size_t i = 0; i < 32; ++i) {
    operands[i] = threads_[first + i].operand;
    threads_[first + i].state = Thread::ready;
  }
  warp.arrived = 0;
  settle_logs(warp);
  operation(static_cast<int>(me / 32), operands);
  warp.ready = 0xffffffffu;
}

void Runner::order_warp() {
  const size_t first = static_cast<size_t>(thread_) / 32 * 32;
  Warp& warp = warps_[first / 32];
  for (size_t i = first; i < first + 32; ++i) warp.known[i] = threads_[i].clock++;
}

int Runner::barrier(const char* name, int id, int wanted, bool value) {
  const auto me = static_cast<size_t>(thread_);
  if (id < 0 || id > 15) fault("barrier number must be in 0..15, got " + std::to_string(id));
  if (wanted <= 0 || wanted > launch_.threads || wanted % 32 != 0) {
    fault("a barrier waits for whole warps of the block, got " + std::to_string(wanted) + " threads");
  }
  Barrier& b = barriers_[id];
  if (b.arrived != 0 && (b.wanted != wanted || std::strcmp(b.name, name) != 0)) {
    fault(std::string("divergent barrier: it came to ") + name + " while others wait at " + b.name);
  }
  Thread& t = threads_[me];
  b.name = name;
  b.wanted = wanted;
  b.count += value ? 1 : 0;
  t.where = name;
  b.waiting.push_back(thread_);
  if (++b.arrived < wanted) {
    t.state = Thread::at_barrier;
    yield();
    return barriers_[id].result;
  }
  ++statistics_.barriers;
  b.result = b.count;
  // Everything any of them knew, and everything each of them did.
  std::vector<uint32_t> known(threads_.size(), 0);
  uint64_t last = ~uint64_t{0};
  for (int i : b.waiting) {
    if (const auto w = static_cast<uint64_t>(i / 32); w != last) {
      last = w;
      const auto& theirs = warps_[w].known;
      for (size_t j = 0; j < known.size(); ++j) known[j] = std::max(known[j], theirs[j]);
    }
  }
  for (int i : b.waiting) known[static_cast<size_t>(i)] = threads_[static_cast<size_t>(i)].clock;
  for (int i : b.waiting) {
    Thread& other = threads_[static_cast<size_t>(i)];
    ++other.clock;
    other.state = Thread::ready;
    Warp& warp = warps_[static_cast<size_t>(i) / 32];
    warp.ready |= 1u << (i % 32);
    if (warp.logged != 0) settle_logs(warp);
    other.accesses = 0;
    warp.known = known;
  }
  b.waiting.clear();
  b.arrived = 0;
  b.count = 0;
  return b.result;
}

bool Runner::happened(uint32_t thread, uint32_t clock, int me) const {
  return static_cast<int>(thread) == me || warps_[static_cast<size_t>(me) / 32].known[thread] >= clock;
}

void Runner::check_range(uint32_t offset, uint32_t bytes, const char* what) {
  if (uint64_t{offset} + bytes > launch_.shared_bytes) {
    fault(std::string("shared memory ") + what + " out of bounds: " + number(bytes) + " bytes at " + number(offset) +
          " of " + number(launch_.shared_bytes));
  }
  if (offset % bytes != 0) {
    fault(std::string("misaligned shared memory ") + what + ": " + number(bytes) + " bytes at " + number(offset));
  }
}

char* Runner::shared_load(uint32_t offset, uint32_t bytes, int thread, Traffic* traffic) {
  check_range(offset, bytes, "load");
  const auto me = static_cast<uint16_t>(thread);
  const uint32_t now = threads_[me].clock;
  for (uint32_t c = offset / kCellBytes; c < (offset + bytes + kCellBytes - 1) / kCellBytes; ++c) {
    Cell& cell = cells_[c];
    const auto at = [&] { return " at byte " + number(uint64_t{c} * kCellBytes); };
    if (cell.in_flight) fault("load of shared memory that a cp.async is still filling (missing wait)" + at());
    if (!cell.written) fault("read of uninitialised shared memory" + at());
    if (!happened(cell.writer, cell.write_clock, thread)) {
      fault("race: reads shared memory that thread " + number(cell.writer) +
            " wrote, with no synchronisation in between," + at());
    }
    if (cell.read && cell.reader != me) {
      cell.other = cell.reader;
      cell.other_clock = cell.read_clock;
      cell.read_other = true;
    }
    cell.reader = me;
    cell.read_clock = now;
    cell.read = true;
  }
  if (traffic != nullptr) log_access(offset, bytes, traffic);
  return shared_.data() + offset;
}

void Runner::check_write(Cell& cell, uint32_t offset, bool atomic) {
  const auto at = [&] { return " at byte " + number(offset); };
  if (cell.in_flight) fault("store to shared memory that a cp.async is still filling (missing wait)" + at());
  if (cell.written && !(atomic && cell.atomic) && !happened(cell.writer, cell.write_clock, thread_)) {
    fault("race: writes shared memory that thread " + number(cell.writer) +
          " wrote, with no synchronisation in between," + at());
  }
  const bool first = cell.read && !happened(cell.reader, cell.read_clock, thread_);
  const bool second = cell.read_other && !happened(cell.other, cell.other_clock, thread_);
  if (first || second) {
    fault("race: writes shared memory that thread " + number(first ? cell.reader : cell.other) +
          " reads, with no synchronisation in between," + at());
  }
  cell.writer = static_cast<uint16_t>(thread_);
  cell.write_clock = threads_[static_cast<size_t>(thread_)].clock;
  cell.written = true;
  cell.read = cell.read_other = false;
  cell.atomic = atomic;
}

char* Runner::shared_store(uint32_t offset, uint32_t bytes, Traffic* traffic) {
  check_range(offset, bytes, "store");
  for (uint32_t c = offset / kCellBytes; c < (offset + bytes + kCellBytes - 1) / kCellBytes; ++c) {
    check_write(cells_[c], c * kCellBytes, false);
  }
  if (traffic != nullptr) log_access(offset, bytes, traffic);
  return shared_.data() + offset;
}

char* Runner::shared_atomic(uint32_t offset, uint32_t bytes) {
  check_range(offset, bytes, "atomic");
  for (uint32_t c = offset / kCellBytes; c < (offset + bytes) / kCellBytes; ++c) {
    if (!cells_[c].written) {
      fault("atomic on uninitialised shared memory at byte " + number(uint64_t{c} * kCellBytes));
    }
    check_write(cells_[c], c * kCellBytes, true);
  }
  return shared_.data() + offset;
}

void Runner::copy_async(uint32_t to, const void* from, uint32_t bytes, uint32_t valid) {
  if (valid > bytes) fault("cp.async of " + number(bytes) + " bytes with " + number(valid) + " valid ones");
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0 && valid != 0) fault("misaligned source of a cp.async");
  if (valid != 0) memory_.check_load(from, valid, false);
  shared_store(to, bytes, &statistics_.cp_async);
  std::memset(shared_.data() + to, 0xff, bytes);
  for (uint32_t c = to / kCellBytes; c < (to + bytes) / kCellBytes; ++c) cells_[c].in_flight = true;
  Copy copy{to, static_cast<uint8_t>(bytes), {}};
  if (valid != 0) std::memcpy(copy.data, from, valid);
  threads_[static_cast<size_t>(thread_)].copies.push_back(copy);
}

void Runner::commit_copies() {
  Thread& t = threads_[static_cast<size_t>(thread_)];
  t.groups.push_back(static_cast<uint32_t>(t.copies.size()));
}

void Runner::wait_copies(uint32_t newest) {
  Thread& t = threads_[static_cast<size_t>(thread_)];
  if (t.groups.size() <= newest) return;
  const size_t finished = t.groups.size() - newest;
  const uint32_t end = t.groups[finished - 1];
  for (uint32_t i = 0; i < end; ++i) {
    const Copy& copy = t.copies[i];
    std::memcpy(shared_.data() + copy.to, copy.data, copy.bytes);
    for (uint32_t c = copy.to / kCellBytes; c < (copy.to + copy.bytes) / kCellBytes; ++c) {
      cells_[c].in_flight = false;
      cells_[c].writer = static_cast<uint16_t>(thread_);
      cells_[c].write_clock = t.clock;
    }
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + end);
  t.groups.erase(t.groups.begin(), t.groups.begin() + static_cast<ptrdiff_t>(finished));
  for (auto& group : t.groups) group -= end;
}

}  // namespace fastxattn::simt
