// Bank conflicts: which shared accesses form one instruction, and how many passes it takes.
#include <algorithm>

#include "simt/runner.h"

namespace fastxattn::simt {

// Lanes of a warp run one after another here; their n-th accesses since they last met are taken for one instruction.
void Runner::log_access(uint32_t offset, uint32_t bytes, Traffic* traffic) {
  const auto me = static_cast<size_t>(thread_);
  Warp& warp = warps_[me / 32];
  const size_t n = threads_[me].accesses++;
  if (n >= warp.logs.size()) warp.logs.resize(n + 64);
  Warp::Log& log = warp.logs[n];
  warp.logged = std::max(warp.logged, n + 1);
  if (log.lanes != 0 && (log.bytes != bytes || log.traffic != traffic)) return;  // lanes went different ways
  log.address[me % 32] = offset;
  log.lanes |= 1u << (me % 32);
  log.bytes = static_cast<uint8_t>(bytes);
  log.traffic = traffic;
}

namespace {

// Passes over the 32 banks of 4 bytes that these words need: lanes that want the same word share it.
int wavefronts(const uint32_t* words, int n) {
  int depth[32] = {0}, most = 0;
  for (int i = 0; i < n; ++i) {
    if (std::find(words, words + i, words[i]) == words + i) most = std::max(most, ++depth[words[i] % 32]);
  }
  return most;
}

}  // namespace

void Runner::settle_logs(Warp& warp) {
  for (size_t i = 0; i < warp.logged; ++i) {
    Warp::Log& log = warp.logs[i];
    if (log.lanes == 0) continue;
    // Wide accesses go by half and quarter warps.
    const int words_each = std::max<int>(1, log.bytes / 4), lanes = 32 / words_each;
    for (int first = 0; first < 32; first += lanes) {
      uint32_t words[32];
      int n = 0;
      for (int lane = first; lane < first + lanes; ++lane) {
        if ((log.lanes >> lane & 1u) == 0) continue;
        for (int w = 0; w < words_each; ++w) words[n++] = log.address[lane] / 4 + static_cast<uint32_t>(w);
      }
      if (n == 0) continue;
      log.traffic->wavefronts += static_cast<uint64_t>(wavefronts(words, n));
      log.traffic->ideal += 1;
    }
    log.lanes = 0;
  }
  warp.logged = 0;
  const auto first = static_cast<size_t>(&warp - warps_.data()) * 32;
  for (size_t i = first; i < first + 32; ++i) threads_[i].accesses = 0;
}

void Runner::count_matrix_rows(const uint32_t (&rows)[8]) {
  uint32_t words[32];
  for (int i = 0; i < 32; ++i) words[i] = rows[i / 4] / 4 + static_cast<uint32_t>(i % 4);
  statistics_.ldmatrix.wavefronts += static_cast<uint64_t>(wavefronts(words, 32));
  statistics_.ldmatrix.ideal += 1;
}

}  // namespace fastxattn::simt
