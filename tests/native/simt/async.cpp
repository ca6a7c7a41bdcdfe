// What compute capability 9.0 does behind the threads' back: mbarriers, copies by the TMA unit, and which memory and
// registers wgmma still works on.
#include <algorithm>
#include <cstring>

#include "simt/runner.h"

namespace fastxattn::simt {

size_t Runner::find_mbarrier(uint32_t offset, const char* what) {
  const auto found =
      std::find_if(mbarriers_.begin(), mbarriers_.end(), [&](const Mbarrier& b) { return b.offset == offset; });
  if (found == mbarriers_.end()) fault(std::string(what) + ": there is no mbarrier at byte " + number(offset));
  if (!happened(static_cast<uint32_t>(found->initialiser), found->init_clock, thread_)) {
    fault(std::string(what) + ": the mbarrier's initialisation by thread " +
          number(static_cast<uint64_t>(found->initialiser)) + " is not synchronised with this use");
  }
  return static_cast<size_t>(found - mbarriers_.begin());
}

void Runner::mbarrier_init(uint32_t offset, int arrivals) {
  if (mbarriers_.size() == kMostMbarriers) fault("more mbarriers than the runner has");
  if (arrivals < 1 || arrivals >= 1 << 20) fault("an mbarrier waits for 1..2^20 - 1 arrivals");
  shared_store(offset, 8, nullptr);
  for (uint32_t c = offset / kCellBytes; c < (offset + 8) / kCellBytes; ++c) cells_[c].mbarrier = true;
  Mbarrier b;
  b.offset = offset;
  b.arrivals = b.pending = arrivals;
  b.initialiser = thread_;
  b.init_clock = threads_[static_cast<size_t>(thread_)].clock;
  b.gathered.assign(threads_.size() + kMostMbarriers, 0);
  mbarriers_.push_back(std::move(b));
}

// Ends the phase when nothing is lacking.
void Runner::settle(Mbarrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.released = std::make_shared<const std::vector<uint32_t>>(b.gathered);
  b.gathered.assign(b.gathered.size(), 0);
  b.pending = b.arrivals;
  ++b.phase;
  for (int i : b.waiting) {
    Thread& t = threads_[static_cast<size_t>(i)];
    t.state = Thread::ready;
    t.known = merged(t.known, b.released);
    warps_[static_cast<size_t>(i) / 32].ready |= 1u << (i % 32);
  }
  b.waiting.clear();
}

void Runner::mbarrier_arrive(uint32_t offset, int bytes) {
  Mbarrier& b = mbarriers_[find_mbarrier(offset, "mbarrier_arrive")];
  Thread& t = threads_[static_cast<size_t>(thread_)];
  if (bytes < 0 || bytes >= 1 << 20) fault("an mbarrier expects at most 2^20 - 1 bytes, got " + std::to_string(bytes));
  if (b.pending == 0) fault("more arrivals than the mbarrier at byte " + number(offset) + " waits for in a phase");
  for (size_t i = 0; i < b.gathered.size(); ++i) b.gathered[i] = std::max(b.gathered[i], (*t.known)[i]);
  b.gathered[static_cast<size_t>(thread_)] = t.clock++;
  b.bytes += bytes;
  --b.pending;
  settle(b);
}

void Runner::mbarrier_wait(uint32_t offset, uint32_t parity) {
  Mbarrier& b = mbarriers_[find_mbarrier(offset, "mbarrier_wait")];
  Thread& t = threads_[static_cast<size_t>(thread_)];
  if ((b.phase & 1u) != parity) {
    t.known = merged(t.known, b.released);
    return;
  }
  t.state = Thread::at_mbarrier;
  t.where = "mbarrier_wait";
  b.waiting.push_back(thread_);
  yield();
}

void Runner::fence_async() {
  Thread& t = threads_[static_cast<size_t>(thread_)];
  t.fences.push_back(t.clock++);
}

// Whether `writer` fenced what it wrote at `clock`, and who knows this much knows that it did.
bool Runner::is_fenced(uint32_t writer, uint32_t clock, const std::vector<uint32_t>& known) const {
  const auto& fences = threads_[writer].fences;
  const auto next = std::lower_bound(fences.begin(), fences.end(), clock);
  return next != fences.end() && known[writer] > *next;
}

// A copy that lands as late as it can unless the order is random, and by then in any order.
void Runner::copy_bulk(uint32_t to, uint32_t mbarrier, std::vector<char> data) {
  const auto bytes = static_cast<uint32_t>(data.size());
  if (to % 1024 != 0) fault("a TMA copy goes to byte " + number(to) + ", not a multiple of 1024");
  if (uint64_t{to} + bytes > launch_.shared_bytes) {
    fault("TMA copy out of bounds of shared memory: " + number(bytes) + " bytes at " + number(to));
  }
  const size_t b = find_mbarrier(mbarrier, "TMA copy");
  auto known = *threads_[static_cast<size_t>(thread_)].known;
  known[static_cast<size_t>(thread_)] = threads_[static_cast<size_t>(thread_)].clock;
  if (!is_fenced(static_cast<uint32_t>(mbarriers_[b].initialiser), mbarriers_[b].init_clock, known)) {
    fault("TMA copy: the mbarrier at byte " + number(mbarrier) + " was initialised without fence_barriers");
  }
  check_matrix_reads(to, bytes);
  for (uint32_t c = to / kCellBytes; c < (to + bytes) / kCellBytes; ++c) {
    Cell& cell = cells_[c];
    const bool by_thread = cell.written && !cell.async;
    if (by_thread && !is_fenced(cell.writer, cell.write_clock, known)) {
      fault("a TMA copy overwrites what thread " + number(cell.writer) + " wrote without fence_async, at byte " +
            number(uint64_t{c} * kCellBytes));
    }
    check_write(cell, c * kCellBytes, false);
    cell.in_flight = Cell::tma;
  }
  std::memset(shared_.data() + to, 0xff, bytes);
  bulk_.push_back({to, b, std::move(data)});
  ++statistics_.tma;
}

bool Runner::land_copy() {
  if (bulk_.empty()) return false;
  const auto next = random_ != 0 ? static_cast<ptrdiff_t>((random_ >> 20) % bulk_.size()) : ptrdiff_t{0};
  const BulkCopy copy = std::move(bulk_[static_cast<size_t>(next)]);
  bulk_.erase(bulk_.begin() + next);
  Mbarrier& b = mbarriers_[copy.mbarrier];
  std::memcpy(shared_.data() + copy.to, copy.data.data(), copy.data.size());
  const size_t agent = threads_.size() + copy.mbarrier;
  for (size_t c = copy.to / kCellBytes; c < (copy.to + copy.data.size()) / kCellBytes; ++c) {
    Cell& cell = cells_[c];
    cell.in_flight = Cell::landed;
    cell.async = true;
    cell.writer = static_cast<uint16_t>(agent);
    cell.write_clock = b.phase + 1;
  }
  b.gathered[agent] = b.phase + 1;
  b.bytes -= static_cast<int64_t>(copy.data.size());
  settle(b);
  return true;
}

// The kernel uses registers that wgmma may work on.
void Runner::use_registers(AsyncRegisters& r) {
  if (r.group != 0) fault("use of registers that a wgmma still works on (missing wgmma_wait)");
  r.touched = threads_[static_cast<size_t>(thread_)].wgmma_fences;
}

// wgmma starts to work on registers of the running lane: the kernel sees garbage until it has waited.
void Runner::busy_registers(AsyncRegisters& r) {
  Thread& t = threads_[static_cast<size_t>(thread_)];
  if (r.group == 0) {
    if (r.touched >= t.wgmma_fences) fault("wgmma on registers that were used since the last wgmma_fence");
    if (r.results != nullptr) {
      std::memcpy(r.results, r.visible, r.bytes);
      std::memset(r.visible, 0xff, r.bytes);
    }
    t.busy.push_back(&r);
  }
  r.group = warps_[static_cast<size_t>(thread_) / 32].committed + 1;
}

void Runner::drop_registers(const AsyncRegisters& r) {
  if (r.group != 0) fault("registers end that a wgmma still works on (missing wgmma_wait)");
}

void Runner::wgmma_fence(int warp) {
  for (size_t i = 0; i < 32; ++i) ++threads_[static_cast<size_t>(warp) * 32 + i].wgmma_fences;
}

void Runner::wgmma_commit(int warp) { ++warps_[static_cast<size_t>(warp)].committed; }

void Runner::wgmma_wait(int warp, uint32_t newest) {
  Warp& w = warps_[static_cast<size_t>(warp)];
  if (w.committed < newest || w.committed - newest <= w.completed) return;
  std::array<uint32_t, 32> clocks;
  for (size_t i = 0; i < 32; ++i) clocks[i] = threads_[static_cast<size_t>(warp) * 32 + i].clock;
  for (; w.completed < w.committed - newest; ++w.completed) w.finished.push_back(clocks);
  for (size_t i = 0; i < 32; ++i) {
    std::erase_if(threads_[static_cast<size_t>(warp) * 32 + i].busy, [&](AsyncRegisters* r) {
      if (r->group > w.completed) return false;
      if (r->results != nullptr) {
        if (std::any_of(r->visible, r->visible + r->bytes, [](char c) { return c != '\xff'; })) {
          fault("registers were written while a wgmma worked on them");
        }
        std::memcpy(r->visible, r->results, r->bytes);
      }
      r->group = 0;
      return true;
    });
  }
}

// By agent: what every thread of a warp group knows.
std::vector<uint32_t> Runner::known_to_group(int group) const {
  std::vector<uint32_t> known(threads_.size() + kMostMbarriers, ~0u);
  for (size_t t = static_cast<size_t>(group) * 128; t < static_cast<size_t>(group) * 128 + 128; ++t) {
    for (size_t i = 0; i < known.size(); ++i) {
      known[i] = std::min(known[i], i == t ? threads_[t].clock : (*threads_[t].known)[i]);
    }
  }
  return known;
}

const char* Runner::matrix_read(uint32_t offset, const std::vector<uint32_t>& known, int group) {
  if (uint64_t{offset} + 16 > launch_.shared_bytes) {
    fault("wgmma reads out of bounds of shared memory: 16 bytes at " + number(offset) + " of " +
          number(launch_.shared_bytes));
  }
  for (uint32_t c = offset / kCellBytes; c < (offset + 16) / kCellBytes; ++c) {
    const Cell& cell = cells_[c];
    const auto at = [&] { return " at byte " + number(uint64_t{c} * kCellBytes); };
    if (cell.mbarrier) fault("wgmma reads an mbarrier" + at());
    if (cell.in_flight != Cell::landed) fault("wgmma reads shared memory that " + filling(cell) + at());
    if (!cell.written) fault("wgmma reads uninitialised shared memory" + at());
    if (known[cell.writer] < cell.write_clock) {
      fault("race: wgmma reads shared memory that " + writer_of(cell) +
            " wrote, with no synchronisation in between with each thread of the warp group," + at());
    }
    if (!cell.async && !is_fenced(cell.writer, cell.write_clock, known)) {
      fault("wgmma reads shared memory that thread " + number(cell.writer) + " wrote without fence_async," + at());
    }
  }
  if (matrix_reads_.empty()) matrix_reads_.assign(shared_.size() / 16 * warps_.size(), 0);
  for (size_t w = static_cast<size_t>(group) * 4; w < static_cast<size_t>(group) * 4 + 4; ++w) {
    matrix_reads_[offset / 16 * warps_.size() + w] = warps_[w].committed + 1;
  }
  return shared_.data() + offset;
}

// The running thread is about to write what wgmma may be reading.
void Runner::check_matrix_reads(uint32_t offset, uint32_t bytes) {
  if (matrix_reads_.empty()) return;
  for (uint32_t line = offset / 16; line < (offset + bytes + 15) / 16; ++line) {
    for (size_t w = 0; w < warps_.size(); ++w) {
      uint32_t& group = matrix_reads_[line * warps_.size() + w];
      if (group == 0) continue;
      const auto text = [&] { return " of warp " + number(w) + " at byte " + number(uint64_t{line} * 16); };
      if (group > warps_[w].completed) fault("overwrites shared memory that a wgmma may still be reading," + text());
      const auto& clocks = warps_[w].finished[group - 1];
      bool known = false;
      for (uint32_t i = 0; i < 32 && !known; ++i) {
        known = happened(static_cast<uint32_t>(w) * 32 + i, clocks[i], thread_);
      }
      if (!known) fault("race: overwrites what a wgmma read, with no synchronisation since its wait," + text());
      group = 0;
    }
  }
}

// Per thread, of a kernel that takes all it can get.
int Runner::launched_registers() const { return std::min(65536 / launch_.threads / 8 * 8, 248); }

void Runner::set_registers(int group, int count, bool grow) {
  const int launched = launched_registers();
  if (count % 8 != 0 || count < 24 || count > 256) fault("a register count must be a multiple of 8 in 24..256");
  if (grow ? count < launched : count > launched) {
    fault("registers_" + std::string(grow ? "grow" : "shrink") + " to " + std::to_string(count) + " from " +
          std::to_string(launched));
  }
  groups_[static_cast<size_t>(group)].registers = count;
}

// What a block may not leave behind.
std::string Runner::unfinished() const {
  const std::string where = std::string(name_) + ", block " + number(static_cast<uint64_t>(block_number_)) + ": ";
  if (!bulk_.empty()) return where + "it ended while a TMA copy was in flight to byte " + number(bulk_.front().to);
  for (const Mbarrier& b : mbarriers_) {
    if (b.bytes != 0) return where + "it ended in the middle of a phase of the mbarrier at byte " + number(b.offset);
  }
  bool changed = false;
  int all = 0;
  for (const WarpGroup& g : groups_) {
    changed |= g.registers != 0;
    all += (g.registers != 0 ? g.registers : launched_registers()) * 128;
  }
  if (!changed || all <= 65536) return "";
  return where + "registers_grow waits for ever: the warp groups want " + std::to_string(all) + " of 65536 registers";
}

}  // namespace fastxattn::simt
