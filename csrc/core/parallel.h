// The host's thread pool, reached through one hook: torch's, ONNX Runtime's, or none (tests, sanitizers).
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace fastxattn {

// Runs body(worker, context) once for each worker in [0, workers), at the same time where the pool can.
struct Parallel {
  using Body = void (*)(int64_t worker, void* context);
  using Run = void (*)(void* pool, int64_t workers, Body body, void* context);

  void* pool = nullptr;  // handed back to `run`; owned by the caller
  Run run = nullptr;     // null: everything runs on the calling thread
  int64_t workers = 1;   // how many threads the pool would use
};

// Calls f(task, worker) for every task in [0, tasks). Tasks are handed out one at a time, so that one
// long task does not hold up the rest; a task must write only what it owns, which keeps results
// independent of the number of threads. `worker` < parallel.workers indexes per-thread scratch memory.
template <class F>
void for_each_task(const Parallel& parallel, int64_t tasks, F&& f) {
  const int64_t workers = parallel.workers < tasks ? parallel.workers : tasks;
  if (workers <= 1 || parallel.run == nullptr) {
    for (int64_t task = 0; task < tasks; ++task) f(task, int64_t{0});
    return;
  }
  struct Shared {
    std::remove_reference_t<F>* f;
    std::atomic<int64_t> next;
    int64_t tasks;
  } shared{&f, {0}, tasks};
  parallel.run(
      parallel.pool, workers,
      [](int64_t worker, void* context) {
        auto& s = *static_cast<Shared*>(context);
        for (int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) {
          (*s.f)(task, worker);
        }
      },
      &shared);
}

}  // namespace fastxattn
