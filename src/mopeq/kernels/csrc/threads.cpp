#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace mopeq {
namespace {

using TorchWork = void (*)(int64_t, int64_t, void *);
using ParallelFor = int32_t (*)(int64_t, int64_t, int64_t, TorchWork, void *);

std::atomic<ParallelFor> torch_pool{nullptr};
std::atomic<bool> forked{false};  // a child of fork() has no pool: GNU OpenMP would wait for threads that are gone

#if !defined(_WIN32)
struct Watch {
  Watch() { pthread_atfork(nullptr, nullptr, [] { forked.store(true); }); }
};
const Watch watch;
#endif

}  // namespace

void set_parallel_for(void *function) { torch_pool.store(reinterpret_cast<ParallelFor>(function)); }

void own_threads(int64_t count, int64_t threads, Work work, void *context) {
  std::vector<std::thread> made;
  int64_t begun = 1;
  const auto bound = [&](int64_t i) { return count * i / threads; };
  try {
    for (; begun < threads; begun++) made.emplace_back(work, bound(begun), bound(begun + 1), context);
  } catch (const std::system_error &) {  // no more threads: the rest is done here
  }
  work(0, bound(1), context);
  if (begun < threads) work(bound(begun), count, context);
  for (auto &thread : made) thread.join();
}

void run(int64_t count, int64_t threads, Work work, void *context) {
  threads = std::min(threads, count);
  if (threads <= 1 || forked.load(std::memory_order_relaxed)) return work(0, count, context);
  const ParallelFor pool = torch_pool.load();
  if (pool == nullptr) return own_threads(count, threads, work, context);
  if (pool(0, count, 1, work, context) != 0) work(0, count, context);
}

}  // namespace mopeq
