#include "memory.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mopeq {
namespace {

constexpr int64_t LARGE = 1 << 20;  // smaller pieces are left to the allocator
constexpr int64_t MOST = 64 << 20;  // bytes that are kept
constexpr int PLACES = 8;
constexpr int64_t HUGE_PAGE = 2 << 20;

struct Piece {
  char *data;
  int64_t size;
};

Piece kept[PLACES];
std::atomic_flag busy = ATOMIC_FLAG_INIT;

// Never waits: who cannot have the kept pieces at once, another thread or the child of a fork, does without.
template <class Do>
void with_kept(Do what) {
  if (busy.test_and_set(std::memory_order_acquire)) return;
  what();
  busy.clear(std::memory_order_release);
}

// From the allocator. In pages of 2 MB where the system has them: rows lie far apart, each in small pages of its own.
char *taken(int64_t &size) {
  const int64_t page = size >= HUGE_PAGE ? HUGE_PAGE : 64;
  size = (size + page - 1) / page * page;
  void *const data = std::aligned_alloc(size_t(page), size_t(size));
#if defined(__linux__)
  if (data && page == HUGE_PAGE) madvise(data, size_t(size), MADV_HUGEPAGE);
#endif
  return static_cast<char *>(data);
}

}  // namespace

Memory::Memory(int64_t count, int64_t bytes) : data_(nullptr) {
  if (count < 0 || count > (INT64_MAX - HUGE_PAGE) / bytes) throw std::bad_alloc();
  size_ = std::max<int64_t>(count * bytes, 1);
  if (size_ >= LARGE)
    with_kept([&] {
      Piece *best = nullptr;
      for (Piece &piece : kept)
        if (piece.size >= size_ && piece.size <= 2 * size_ && (!best || piece.size < best->size)) best = &piece;
      if (best) data_ = best->data, size_ = best->size, *best = {nullptr, 0};
    });
  if (!data_) data_ = taken(size_);
  if (!data_) throw std::bad_alloc();
}

Memory::~Memory() {
  if (size_ >= LARGE)
    with_kept([&] {
      int64_t all = size_;
      Piece *place = nullptr;
      for (Piece &piece : kept) {
        all += piece.size;
        if (!piece.data) place = &piece;
      }
      if (place && all <= MOST) *place = {data_, size_}, data_ = nullptr;
    });
  std::free(data_);
}

void release() {
  with_kept([] {
    for (Piece &piece : kept) {
      std::free(piece.data);
      piece = {nullptr, 0};
    }
  });
}

}  // namespace mopeq
