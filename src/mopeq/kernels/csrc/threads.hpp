// Work on torch's pool of threads, or on our own where torch offers none.
#pragma once
#include <cstdint>

namespace mopeq {

using Work = void (*)(int64_t begin, int64_t end, void *context);

void set_parallel_for(void *function);
// Calls work on pieces of [0, count) that make up the whole, with at most `threads` threads; one after fork().
void run(int64_t count, int64_t threads, Work work, void *context);
// The same on threads made for it, for work that waits for a disk or goes on beside torch's.
void own_threads(int64_t count, int64_t threads, Work work, void *context);

}  // namespace mopeq
