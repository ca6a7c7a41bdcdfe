// Shared memory: bounds, who may read and write what when, and cp.async.
#include <algorithm>
#include <cstring>

#include "simt/runner.h"

namespace fastxattn::simt {

bool Runner::happened(uint32_t agent, uint32_t clock, int me) const {
  return static_cast<int>(agent) == me || (*threads_[static_cast<size_t>(me)].known)[agent] >= clock;
}

std::string Runner::writer_of(const Cell& cell) const {
  return cell.writer < threads_.size() ? "thread " + number(cell.writer) : "a TMA copy";
}

std::string Runner::filling(const Cell& cell) const {
  return cell.in_flight == Cell::tma ? "a TMA copy is still filling (its mbarrier was not waited for)"
                                     : "a cp.async is still filling (missing wait)";
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
    if (cell.mbarrier) fault("load of an mbarrier" + at());
    if (cell.in_flight != Cell::landed) fault("load of shared memory that " + filling(cell) + at());
    if (!cell.written) fault("read of uninitialised shared memory" + at());
    if (!happened(cell.writer, cell.write_clock, thread)) {
      fault("race: reads shared memory that " + writer_of(cell) + " wrote, with no synchronisation in between," + at());
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
  if (cell.mbarrier) fault("store to an mbarrier" + at());
  if (cell.in_flight != Cell::landed) fault("store to shared memory that " + filling(cell) + at());
  if (cell.written && !(atomic && cell.atomic) && !happened(cell.writer, cell.write_clock, thread_)) {
    fault("race: writes shared memory that " + writer_of(cell) + " wrote, with no synchronisation in between," + at());
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
  cell.async = false;
}

char* Runner::shared_store(uint32_t offset, uint32_t bytes, Traffic* traffic) {
  check_range(offset, bytes, "store");
  check_matrix_reads(offset, bytes);
  for (uint32_t c = offset / kCellBytes; c < (offset + bytes + kCellBytes - 1) / kCellBytes; ++c) {
    check_write(cells_[c], c * kCellBytes, false);
  }
  if (traffic != nullptr) log_access(offset, bytes, traffic);
  return shared_.data() + offset;
}

char* Runner::shared_atomic(uint32_t offset, uint32_t bytes) {
  check_range(offset, bytes, "atomic");
  check_matrix_reads(offset, bytes);
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
  for (uint32_t c = to / kCellBytes; c < (to + bytes) / kCellBytes; ++c) cells_[c].in_flight = Cell::cp_async;
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
      cells_[c].in_flight = Cell::landed;
      cells_[c].writer = static_cast<uint16_t>(thread_);
      cells_[c].write_clock = t.clock;
    }
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + end);
  t.groups.erase(t.groups.begin(), t.groups.begin() + static_cast<ptrdiff_t>(finished));
  for (auto& group : t.groups) group -= end;
}

}  // namespace fastxattn::simt
