#include "core/cpu/parallel.h"

#include <atomic>
#include <exception>

namespace fastxattn {
namespace {

struct Loop {
  void (*task)(void* function, int64_t task, int64_t worker);
  void* function;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // of the first task that failed
};

// An exception may not leave this function: a thread of ONNX Runtime's pool that is unwound never reports back, and
// the run hangs; torch's pool would lose the message.
void work(int64_t worker, void* context) {
  Loop& loop = *static_cast<Loop*>(context);
  try {
    for (int64_t task; (task = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;) {
      loop.task(loop.function, task, worker);
    }
  } catch (...) {
    loop.next.store(loop.tasks, std::memory_order_relaxed);
    if (!loop.failed.exchange(true)) loop.error = std::current_exception();
  }
}

}  // namespace

void run_tasks(const Parallel& parallel, int64_t workers, int64_t tasks,
               void (*task)(void* function, int64_t task, int64_t worker), void* function) {
  Loop loop{task, function, tasks};
  parallel.run(parallel.pool, workers, work, &loop);
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace fastxattn
