#include "simt/runner.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>

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
  groups_.assign((n + 127) / 128, WarpGroup{});
  mbarriers_.clear();
  bulk_.clear();
  matrix_reads_.clear();
  const auto nothing = std::make_shared<const std::vector<uint32_t>>(n + kMostMbarriers, 0);
  for (auto& barrier : barriers_) barrier = Barrier{};
  for (auto& warp : warps_) {
    warp.ready = 0xffffffffu;
    warp.arrived = 0;
    warp.committed = warp.completed = 0;
    warp.finished.clear();
    for (auto& log : warp.logs) log.lanes = 0;
    warp.logged = 0;
  }
  for (size_t i = 0; i < n; ++i) {
    Thread& t = threads_[i];
    t.state = Thread::ready;
    t.clock = 1;
    t.accesses = 0;
    t.known = nothing;
    t.copies.clear();
    t.groups.clear();
    t.fences.clear();
    t.busy.clear();
    t.wgmma_fences = 0;
    char* stack = stack_of(static_cast<int>(i));
    std::memcpy(stack, &kCanary, sizeof(kCanary));
    t.fiber.prepare(stack, kStackBytes, &thread_main);
  }
  finished_ = 0;
  fault_.clear();
  thread_ = pick();
  Fiber::swap(main_, threads_[static_cast<size_t>(thread_)].fiber);
  if (fault_.empty() && finished_ < launch_.threads) fault_ = deadlock();
  if (fault_.empty()) fault_ = unfinished();
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
  if (random_ != 0 && (random_ >> 50 & 7u) == 0) land_copy();
  int next = pick();
  while (next < 0 && finished_ < launch_.threads && land_copy()) next = pick();
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
  const bool never =
      std::any_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state == Thread::at_mbarrier; });
  std::string text = std::string(name_) + ", block " + number(static_cast<uint64_t>(block_number_)) +
                     (never ? ": deadlock: an mbarrier never completes:" : ": divergent barrier:") +
                     " threads wait for each other in different places:";
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
  for (const Mbarrier& b : mbarriers_) {
    if (b.waiting.empty()) continue;
    text += " the mbarrier at byte " + number(b.offset) + " lacks " + std::to_string(b.pending) + " arrivals and " +
            std::to_string(b.bytes) + " bytes in phase " + number(b.phase) + ";";
  }
  return text;
}

void Runner::warp_operation(const char* name, WarpOperation operation, void* operand, bool by_group) {
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
  ++warp.arrived;
  WarpGroup* group = by_group ? &groups_[me / 128] : nullptr;
  if (warp.arrived == 32 && by_group) {
    if (me / 128 * 128 + 128 > threads_.size()) fault(std::string(name) + " needs a warp group of 128 threads");
    if (group->arrived != 0 && (group->operation != operation || std::strcmp(group->name, name) != 0)) {
      fault(std::string("divergent warp group: it came to ") + name + " while warps of its group wait at " +
            group->name);
    }
    group->name = name;
    group->operation = operation;
    ++group->arrived;
  }
  if (warp.arrived < 32 || (by_group && group->arrived < 4)) {
    t.state = Thread::at_warp;
    yield();
    return;
  }
  const size_t lanes = by_group ? 128 : 32, first = me / lanes * lanes;
  void* operands[128];
  for (size_t i = 0; i < lanes; ++i) {
    operands[i] = threads_[first + i].operand;
    threads_[first + i].state = Thread::ready;
  }
  if (by_group) group->arrived = 0;
  for (size_t w = first / 32; w < (first + lanes) / 32; ++w) {
    warps_[w].arrived = 0;
    settle_logs(warps_[w]);
  }
  operation(static_cast<int>(first / 32), operands);
  for (size_t w = first / 32; w < (first + lanes) / 32; ++w) warps_[w].ready = 0xffffffffu;
}

Known Runner::merged(const Known& a, const Known& b) {
  if (a == b || b == nullptr) return a;
  auto both = std::make_shared<std::vector<uint32_t>>(*a);
  for (size_t i = 0; i < both->size(); ++i) (*both)[i] = std::max((*both)[i], (*b)[i]);
  return both;
}

// What all of these threads know, and did themselves; their clocks advance.
template <class Threads>
Known Runner::meet(const Threads& who) {
  Known last = nullptr;
  auto known = std::make_shared<std::vector<uint32_t>>(threads_.size() + kMostMbarriers, 0);
  for (auto i : who) {
    const Known& theirs = threads_[static_cast<size_t>(i)].known;
    if (theirs == last) continue;
    last = theirs;
    for (size_t j = 0; j < known->size(); ++j) (*known)[j] = std::max((*known)[j], (*theirs)[j]);
  }
  for (auto i : who) (*known)[static_cast<size_t>(i)] = threads_[static_cast<size_t>(i)].clock++;
  for (auto i : who) threads_[static_cast<size_t>(i)].known = known;
  return known;
}

void Runner::order_warp() {
  std::array<int, 32> lanes;
  std::iota(lanes.begin(), lanes.end(), thread_ / 32 * 32);
  meet(lanes);
}

int Runner::barrier(const char* name, int id, int needed, bool value) {
  const auto me = static_cast<size_t>(thread_);
  if (id < 0 || id > 15) fault("barrier number must be in 0..15, got " + std::to_string(id));
  if (needed <= 0 || needed > launch_.threads || needed % 32 != 0) {
    fault("a barrier waits for whole warps of the block, got " + std::to_string(needed) + " threads");
  }
  Barrier& b = barriers_[id];
  if (b.arrived != 0 && (b.needed != needed || std::strcmp(b.name, name) != 0)) {
    fault(std::string("divergent barrier: it came to ") + name + " while others wait at " + b.name);
  }
  Thread& t = threads_[me];
  b.name = name;
  b.needed = needed;
  b.count += value ? 1 : 0;
  t.where = name;
  b.waiting.push_back(thread_);
  if (++b.arrived < needed) {
    t.state = Thread::at_barrier;
    yield();
    return barriers_[id].result;
  }
  ++statistics_.barriers;
  b.result = b.count;
  meet(b.waiting);
  for (int i : b.waiting) {
    Thread& other = threads_[static_cast<size_t>(i)];
    other.state = Thread::ready;
    Warp& warp = warps_[static_cast<size_t>(i) / 32];
    warp.ready |= 1u << (i % 32);
    if (warp.logged != 0) settle_logs(warp);
    other.accesses = 0;
  }
  b.waiting.clear();
  b.arrived = 0;
  b.count = 0;
  return b.result;
}

}  // namespace fastxattn::simt
