// Plain bit strings to panels and back. The slow twin is panels.py.
#include <algorithm>
#include <cstring>

#include "kernels.hpp"
#include "mopeq_cpu.h"
#include "threads.hpp"

namespace mopeq {
namespace {

// 4 codes of a bit string, in the low 4*B bits, to the 4 bytes of a word, and back.
template <int B>
uint32_t spread(uint32_t v) {
  if constexpr (B == 8) return v;
  constexpr uint32_t two = (1u << 2 * B) - 1, one = ((1u << B) - 1) * 0x00010001u;
  v = (v & two) | (v >> 2 * B & two) << 16;
  return (v & one) | (v >> B & one) << 8;
}

template <int B>
uint32_t gather(uint32_t v) {
  if constexpr (B == 8) return v;
  constexpr uint32_t two = (1u << 2 * B) - 1, one = ((1u << B) - 1) * 0x00010001u;
  v = (v & one) | (v >> 8 & one) << B;
  return (v & two) | (v >> 16 & two) << 2 * B;
}

constexpr uint32_t lanes(int mask) { return uint32_t(mask) * 0x01010101u; }

// 8 chunks of 4 codes of one row, as words, to its `B` words of a block of lines, and back.
template <int B>
void join(const uint32_t *c, uint32_t *w) {
  if constexpr (B == 2)
    for (int n = 0; n < 2; n++) w[n] = c[4 * n] | c[4 * n + 1] << 2 | c[4 * n + 2] << 4 | c[4 * n + 3] << 6;
  if constexpr (B == 3) {
    const uint32_t rest = c[6] | c[7] << 3;
    for (int n = 0; n < 3; n++) w[n] = c[2 * n] | c[2 * n + 1] << 3 | (rest >> 2 * n & lanes(3)) << 6;
  }
  if constexpr (B == 4 || B == 5 || B == 6)
    for (int n = 0; n < 4; n++) w[n] = (c[2 * n] & lanes(15)) | (c[2 * n + 1] & lanes(15)) << 4;
  if constexpr (B == 5) {
    w[4] = 0;
    for (int k = 0; k < 8; k++) w[4] |= (c[k] >> 4 & lanes(1)) << k;
  }
  if constexpr (B == 6)
    for (int n = 0; n < 2; n++) {
      w[4 + n] = 0;
      for (int k = 0; k < 4; k++) w[4 + n] |= (c[4 * n + k] >> 4 & lanes(3)) << 2 * k;
    }
  if constexpr (B == 8) std::memcpy(w, c, 32);
}

template <int B>
void part(const uint32_t *w, uint32_t *c) {
  if constexpr (B == 2)
    for (int k = 0; k < 8; k++) c[k] = w[k / 4] >> 2 * (k % 4) & lanes(3);
  if constexpr (B == 3) {
    const uint32_t rest = (w[0] >> 6 & lanes(3)) | (w[1] >> 6 & lanes(3)) << 2 | (w[2] >> 6 & lanes(3)) << 4;
    for (int k = 0; k < 8; k++) c[k] = (k < 6 ? w[k / 2] : rest) >> 3 * (k % 2) & lanes(7);
  }
  if constexpr (B == 4 || B == 5 || B == 6)
    for (int k = 0; k < 8; k++) c[k] = w[k / 2] >> 4 * (k % 2) & lanes(15);
  if constexpr (B == 5)
    for (int k = 0; k < 8; k++) c[k] |= (w[4] >> k & lanes(1)) << 4;
  if constexpr (B == 6)
    for (int k = 0; k < 8; k++) c[k] |= (w[4 + k / 4] >> 2 * (k % 4) & lanes(3)) << 4;
  if constexpr (B == 8) std::memcpy(c, w, 32);
}

struct Codes {
  const uint8_t *from;
  uint8_t *to;
  int64_t rows, inputs;
};

// One block of 32 inputs of a full panel, all rows at once, so that the compiler can give each its lane.
template <int B>
void block_to_panel(const uint8_t *plain, int64_t row_bytes, uint8_t *panel) {
  uint32_t words[B + 1][PANEL] = {}, lines[B][PANEL];  // a row's bits, with a word of zeros behind them
  for (int r = 0; r < PANEL; r++)
    for (int n = 0; n < B; n++) std::memcpy(&words[n][r], plain + r * row_bytes + 4 * n, 4);
  for (int r = 0; r < PANEL; r++) {
    uint32_t c[8], w[8];
    for (int k = 0; k < 8; k++) {
      const int at = 4 * B * k / 32, shift = 4 * B * k % 32;
      const uint64_t two = words[at][r] | uint64_t(words[at + 1][r]) << 32;
      c[k] = spread<B>(uint32_t(two >> shift & ((uint64_t(1) << 4 * B) - 1)));
    }
    join<B>(c, w);
    for (int n = 0; n < B; n++) lines[n][r] = w[n];
  }
  std::memcpy(panel, lines, sizeof lines);
}

template <int B, bool TO_PANELS>
void panels(int64_t begin, int64_t end, void *context) {
  const Codes &job = *static_cast<Codes *>(context);
  const int64_t row_bytes = job.inputs * B / 8;
  for (int64_t p = begin; p < end; p++) {
    const int64_t first = p * PANEL, height = std::min<int64_t>(PANEL, job.rows - first);
    for (int64_t block = 0; block < job.inputs / BLOCK; block++) {
      if (TO_PANELS && B < 8 && height == PANEL) {
        const int64_t at = first * row_bytes + block * 4 * B;
        block_to_panel<B>(job.from + at, row_bytes, job.to + first * row_bytes + block * PANEL * 4 * B);
        continue;
      }
      for (int64_t r = 0; r < height; r++) {
        const int64_t plain = (first + r) * row_bytes + block * 4 * B;
        const int64_t panel = first * row_bytes + block * height * 4 * B + 4 * r;
        uint32_t c[8], w[8];
        if constexpr (TO_PANELS) {
          uint64_t word = 0;
          for (int k = 0; k < 8; k += 2) {  // two chunks are B bytes
            std::memcpy(&word, job.from + plain + k / 2 * B, B);
            c[k] = spread<B>(uint32_t(word & ((uint64_t(1) << 4 * B) - 1)));
            c[k + 1] = spread<B>(uint32_t(word >> 4 * B));
          }
          join<B>(c, w);
          for (int n = 0; n < B; n++) std::memcpy(job.to + panel + n * height * 4, &w[n], 4);
        } else {
          for (int n = 0; n < B; n++) std::memcpy(&w[n], job.from + panel + n * height * 4, 4);
          part<B>(w, c);
          for (int k = 0; k < 8; k += 2) {
            const uint64_t word = gather<B>(c[k]) | uint64_t(gather<B>(c[k + 1])) << 4 * B;
            std::memcpy(job.to + plain + k / 2 * B, &word, B);
          }
        }
      }
    }
  }
}

template <int B>
void repack(Codes job, bool to_panels, int64_t threads) {
  run((job.rows + PANEL - 1) / PANEL, threads, to_panels ? panels<B, true> : panels<B, false>, &job);
}

// (rows / 8, groups) records of `size` bytes to (panels, groups, 2 or 1) records; `plain` gives a record's place.
template <class Place>
void records(const uint8_t *from, uint8_t *to, int64_t eights, int64_t groups, int64_t size, bool to_panels,
             Place plain) {
  for (int64_t i = 0; i < eights; i++)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t pair = std::min<int64_t>(2, eights - i / 2 * 2);
      const int64_t a = plain(i, g), b = (i / 2 * 2 * groups + g * pair + i % 2) * size;
      std::memcpy(to + (to_panels ? b : a), from + (to_panels ? a : b), size_t(size));
    }
}

bool bad(int64_t rows, int64_t other) {
  return rows < 8 || rows % 8 || rows >= int64_t(1) << 31 || other < 1 || other >= int64_t(1) << 31;
}

}  // namespace
}  // namespace mopeq

extern "C" {

int mopeq_repack_codes(const uint8_t *from, uint8_t *to, int64_t rows, int64_t inputs, int64_t bits, int64_t to_panels,
                       int64_t threads) {
  if (!from || !to) return MOPEQ_NULL;
  if (mopeq::bad(rows, inputs) || inputs % mopeq::BLOCK) return MOPEQ_SHAPE;
  const mopeq::Codes job{from, to, rows, inputs};
  switch (bits) {
    case 2: mopeq::repack<2>(job, to_panels, threads); break;
    case 3: mopeq::repack<3>(job, to_panels, threads); break;
    case 4: mopeq::repack<4>(job, to_panels, threads); break;
    case 5: mopeq::repack<5>(job, to_panels, threads); break;
    case 6: mopeq::repack<6>(job, to_panels, threads); break;
    case 8: mopeq::repack<8>(job, to_panels, threads); break;
    default: return MOPEQ_BITS;
  }
  return MOPEQ_OK;
}

int mopeq_repack_scales(const uint16_t *from, uint16_t *to, int64_t rows, int64_t groups, int64_t to_panels) {
  if (!from || !to) return MOPEQ_NULL;
  if (mopeq::bad(rows, groups)) return MOPEQ_SHAPE;
  if (reinterpret_cast<uintptr_t>(from) % 2 || reinterpret_cast<uintptr_t>(to) % 2) return MOPEQ_ALIGN;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t first = r / 16 * 16, height = std::min<int64_t>(16, rows - first);
    for (int64_t g = 0; g < groups; g++) {
      const int64_t plain = r * groups + g, panel = first * groups + g * height + r - first;
      to[to_panels ? panel : plain] = from[to_panels ? plain : panel];
    }
  }
  return MOPEQ_OK;
}

int mopeq_repack_zeros(const uint8_t *from, uint8_t *to, int64_t rows, int64_t groups, int64_t bits,
                       int64_t to_panels) {
  if (!from || !to) return MOPEQ_NULL;
  if (mopeq::bad(rows, groups)) return MOPEQ_SHAPE;
  if (bits < 2 || bits > 8 || bits == 7) return MOPEQ_BITS;
  mopeq::records(from, to, rows / 8, groups, bits, to_panels != 0,
                 [&](int64_t i, int64_t g) { return (g * (rows / 8) + i) * bits; });
  return MOPEQ_OK;
}

}  // extern "C"
