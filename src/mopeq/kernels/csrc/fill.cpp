// Tensors straight from their files into memory, packed matrices as panels: one pass, a piece that fits in a cache at a
// time, without a second copy of the model.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>

#include "kernels.hpp"
#include "mopeq_cpu.h"
#include "threads.hpp"

#if defined(_WIN32)
#error "reads with pread"
#endif
#include <unistd.h>

namespace mopeq {
namespace {

constexpr int64_t PIECE = 256 << 10;  // bytes that are read at a time
constexpr int64_t LIMIT = int64_t(1) << 31;

struct Room {
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
  int64_t size = 0;

  char *take(int64_t bytes) {
    if (bytes > size) {
      memory.reset(static_cast<char *>(std::malloc(size_t(bytes))));
      size = memory ? bytes : 0;
    }
    return memory.get();
  }
};

int read_all(int64_t file, int64_t begin, int64_t bytes, void *to) {
  for (char *at = static_cast<char *>(to); bytes > 0;) {
    const ssize_t got = pread(int(file), at, size_t(std::min<int64_t>(bytes, 1 << 30)), off_t(begin));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return MOPEQ_FILE;
    at += got, begin += got, bytes -= got;
  }
  return MOPEQ_OK;
}

// Bytes of a row of codes or scales; 0 where zero points lie by groups.
int64_t row_bytes(const mopeq_stored &s) {
  return s.part == MOPEQ_CODES ? s.columns / 8 * s.bits : s.part == MOPEQ_SCALES ? 2 * s.columns : 0;
}

int check(const mopeq_stored &s) {
  if (!s.to) return MOPEQ_NULL;
  if (s.file < 0 || s.file >= LIMIT || s.begin < 0 || s.bytes < 0) return MOPEQ_RANGE;
  if (s.part == MOPEQ_PLAIN) return MOPEQ_OK;
  if (s.part < MOPEQ_PLAIN || s.part > MOPEQ_POINTS) return MOPEQ_TYPE;
  if (s.rows < 8 || s.rows % 8 || s.rows >= LIMIT || s.columns < 1 || s.columns >= LIMIT) return MOPEQ_SHAPE;
  if (s.part == MOPEQ_CODES && s.columns % BLOCK) return MOPEQ_SHAPE;
  if (s.part != MOPEQ_SCALES && (s.bits < 2 || s.bits > 8 || s.bits == 7)) return MOPEQ_BITS;
  const int64_t all = s.part == MOPEQ_POINTS ? s.rows / 8 * s.bits * s.columns : s.rows * row_bytes(s);
  if (s.part == MOPEQ_SCALES && reinterpret_cast<uintptr_t>(s.to) % 2) return MOPEQ_ALIGN;
  return all == s.bytes ? MOPEQ_OK : MOPEQ_RANGE;
}

int fill(const mopeq_stored &s, Room &room) {
  if (s.part == MOPEQ_PLAIN) return read_all(s.file, s.begin, s.bytes, s.to);
  const int64_t row = row_bytes(s);
  const int64_t step = row ? std::max<int64_t>(PANEL, PIECE / row / PANEL * PANEL) : s.rows;
  for (int64_t first = 0; first < s.rows; first += step) {
    const int64_t some = std::min(step, s.rows - first), bytes = row ? some * row : s.bytes;
    char *read = room.take(bytes), *to = static_cast<char *>(s.to) + first * row;
    if (!read) return MOPEQ_MEMORY;
    if (const int wrong = read_all(s.file, s.begin + first * row, bytes, read)) return wrong;
    int wrong = MOPEQ_OK;
    const auto *from = reinterpret_cast<const uint8_t *>(read);
    if (s.part == MOPEQ_CODES)
      wrong = mopeq_repack_codes(from, reinterpret_cast<uint8_t *>(to), some, s.columns, s.bits, 1, 1);
    else if (s.part == MOPEQ_SCALES)
      wrong = mopeq_repack_scales(reinterpret_cast<const uint16_t *>(read), reinterpret_cast<uint16_t *>(to), some,
                                  s.columns, 1);
    else
      wrong = mopeq_repack_zeros(from, reinterpret_cast<uint8_t *>(to), some, s.columns, s.bits, 1);
    if (wrong) return wrong;
  }
  return MOPEQ_OK;
}

struct Filling {
  const mopeq_stored *stored;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int> fault{MOPEQ_OK};
};

void filling(int64_t, int64_t, void *context) {
  Filling &all = *static_cast<Filling *>(context);
  Room room;
  for (int64_t i; all.fault.load() == MOPEQ_OK && (i = all.next++) < all.count;)
    if (const int wrong = fill(all.stored[i], room)) all.fault.store(wrong);
}

}  // namespace
}  // namespace mopeq

extern "C" int mopeq_fill(const mopeq_stored *stored, int64_t count, int64_t threads) {
  if (!stored && count) return MOPEQ_NULL;
  if (count < 0) return MOPEQ_SHAPE;
  for (int64_t i = 0; i < count; i++)
    if (const int wrong = mopeq::check(stored[i])) return wrong;
  mopeq::Filling all{stored, count};
  threads = std::max<int64_t>(1, std::min(threads, count));
  mopeq::own_threads(threads, threads, mopeq::filling, &all);
  return all.fault.load();
}
