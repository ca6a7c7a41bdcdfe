// The host's thread pool, reached through one hook: torch's, ONNX Runtime's, or none (tests, sanitizers).
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastxattn {

// Runs body(worker, context) once for each worker in [0, workers), at the same time where the pool can, and returns
// after the last one has returned. `body` never throws.
struct Parallel {
  using Body = void (*)(int64_t worker, void* context);
  using Run = void (*)(void* pool, int64_t workers, Body body, void* context);

  void* pool = nullptr;  // handed back to `run`; owned by the caller
  Run run = nullptr;     // null: everything runs on the calling thread
  int64_t workers = 1;   // how many threads the pool would use
};

// for_each_task on more than one worker; `task` gets `function` back.
void run_tasks(const Parallel& parallel, int64_t workers, int64_t tasks,
               void (*task)(void* function, int64_t task, int64_t worker), void* function);

// Calls f(task, worker) for every task in [0, tasks). Tasks are handed out one at a time, so that one
// long task does not hold up the rest; a task must write only what it owns, which keeps results
// independent of the number of threads. `worker` < parallel.workers indexes per-thread scratch memory.
// The first exception of a task ends the loop and is thrown on the calling thread.
template <class F>
void for_each_task(const Parallel& parallel, int64_t tasks, F&& f) {
  const int64_t workers = parallel.workers < tasks ? parallel.workers : tasks;
  if (workers <= 1 || parallel.run == nullptr) {
    for (int64_t task = 0; task < tasks; ++task) f(task, int64_t{0});
    return;
  }
  using Function = std::remove_reference_t<F>;
  run_tasks(
      parallel, workers, tasks,
      [](void* function, int64_t task, int64_t worker) { (*static_cast<Function*>(function))(task, worker); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace fastxattn
