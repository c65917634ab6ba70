// AVX-512 with F, BW, VL and VNNI. A panel of 16 rows is one register; one of 8 goes the way of AVX2.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "mopeq_cpu.h"

namespace {

#include "avx2.inc"
#include "loops.inc"
#include "grids.inc"
#include "panel.inc"
#include "tile.inc"

struct Avx512 {
  enum { HEIGHT = 16 };
  using Code = __m512i;
  using Int = __m512i;
  using Float = __m512;

  static inline __m512i byte(int v) { return _mm512_set1_epi8(char(v)); }
  static inline __m512i both(__m512i v, __m512i mask) { return _mm512_and_si512(v, mask); }
  // mask ? a : b
  static inline __m512i pick(__m512i mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
  }

  // At 2 and 3 bits, codes of odd chunks stay where they are, 4 and 8 times too large; `dot` shifts their sum.
  template <int B>
  static inline void unpack(const uint8_t *w, Code *c) {
    const auto line = [&](int n) { return _mm512_loadu_si512(w + 64 * n); };
    if constexpr (B == 2)
      for (int n = 0; n < 2; n++) {
        const __m512i v = line(n), u = _mm512_srli_epi16(v, 4);
        c[4 * n] = both(v, byte(3)), c[4 * n + 1] = both(v, byte(12));
        c[4 * n + 2] = both(u, byte(3)), c[4 * n + 3] = both(u, byte(12));
      }
    if constexpr (B == 3) {
      const __m512i a = line(0), b = line(1), d = line(2);
      __m512i rest = pick(byte(3), _mm512_srli_epi16(a, 6), _mm512_srli_epi16(b, 4));
      rest = pick(byte(15), rest, _mm512_srli_epi16(d, 2));
      c[0] = both(a, byte(7)), c[1] = both(a, byte(56)), c[2] = both(b, byte(7)), c[3] = both(b, byte(56));
      c[4] = both(d, byte(7)), c[5] = both(d, byte(56)), c[6] = both(rest, byte(7)), c[7] = both(rest, byte(56));
    }
    if constexpr (B == 4 || B == 5 || B == 6)
      for (int n = 0; n < 4; n++) {
        const __m512i v = line(n);
        c[2 * n] = both(v, byte(15)), c[2 * n + 1] = both(_mm512_srli_epi16(v, 4), byte(15));
      }
    if constexpr (B == 5) {
      const __m512i h = line(4), bit = byte(16);
      c[0] = pick(bit, _mm512_slli_epi16(h, 4), c[0]), c[1] = pick(bit, _mm512_slli_epi16(h, 3), c[1]);
      c[2] = pick(bit, _mm512_slli_epi16(h, 2), c[2]), c[3] = pick(bit, _mm512_slli_epi16(h, 1), c[3]);
      c[4] = pick(bit, h, c[4]), c[5] = pick(bit, _mm512_srli_epi16(h, 1), c[5]);
      c[6] = pick(bit, _mm512_srli_epi16(h, 2), c[6]), c[7] = pick(bit, _mm512_srli_epi16(h, 3), c[7]);
    }
    if constexpr (B == 6)
      for (int n = 0; n < 2; n++) {
        const __m512i h = line(4 + n), two = byte(48);
        c[4 * n] = pick(two, _mm512_slli_epi16(h, 4), c[4 * n]);
        c[4 * n + 1] = pick(two, _mm512_slli_epi16(h, 2), c[4 * n + 1]);
        c[4 * n + 2] = pick(two, h, c[4 * n + 2]);
        c[4 * n + 3] = pick(two, _mm512_srli_epi16(h, 2), c[4 * n + 3]);
      }
    if constexpr (B == 8)
      for (int n = 0; n < 8; n++) c[n] = line(n);
    if constexpr (B == mopeq::CODEBOOK) {
      const auto points = [](int n) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(mopeq::POINTS[n])));
      };
      const __m512i even = points(0), odd = points(1);
      for (int n = 0; n < 2; n++) {
        const __m512i v = line(n), low = both(v, byte(15)), high = both(_mm512_srli_epi16(v, 4), byte(15));
        c[4 * n] = _mm512_shuffle_epi8(even, low), c[4 * n + 1] = _mm512_shuffle_epi8(odd, low);
        c[4 * n + 2] = _mm512_shuffle_epi8(even, high), c[4 * n + 3] = _mm512_shuffle_epi8(odd, high);
      }
    }
  }

  static inline __m512i four(const int8_t *q) {
    int32_t v;
    __builtin_memcpy(&v, q, 4);
    return _mm512_set1_epi32(v);
  }

  template <int B>
  static inline Int dot(const Code *c, const int8_t *q, Int z, int32_t minus) {
    constexpr int SHIFT = B == 2 ? 2 : B == 3 ? 3 : 0;
    Int even = _mm512_dpwssd_epi32(_mm512_setzero_si512(), z, _mm512_set1_epi32(minus));
    Int odd = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int k = 0; k < 8; k += 2) {
      even = _mm512_dpbusd_epi32(even, c[k], four(q + 4 * k));
      odd = _mm512_dpbusd_epi32(odd, c[k + 1], four(q + 4 * k + 4));
    }
    if constexpr (SHIFT > 0) odd = _mm512_srai_epi32(odd, SHIFT);
    return _mm512_add_epi32(even, odd);
  }
  // For tiles. One product; codes of odd chunks brought to their place, and moved up.
  static inline Int dot(Int sum, Code c, Code q) { return _mm512_dpbusd_epi32(sum, c, q); }
  template <int B>
  static inline Code settle(Code c) { return B == 2 || B == 3 ? _mm512_srli_epi16(c, B) : c; }
  static inline Code up(Int z, int32_t zero) {
    return _mm512_mullo_epi32(_mm512_sub_epi32(_mm512_set1_epi32(zero), z), _mm512_set1_epi32(0x01010101));
  }
  static inline Code add(Code c, Code up) { return _mm512_add_epi8(c, up); }
  static inline Int all(int32_t v) { return _mm512_set1_epi32(v); }
  static inline Int sum(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static inline Code code(const uint8_t *p) { return _mm512_load_si512(p); }
  static inline void store(void *p, Int v) { _mm512_store_si512(p, v); }
  static inline Int nothing() { return _mm512_setzero_si512(); }

  template <int B>
  static inline Int zeros(const uint8_t *p) {
    if constexpr (B == 8) {
      return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    } else {
      const __m256i low = Avx2::zeros<B>(p), high = Avx2::zeros<B>(p + B);
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
  }
  template <int B>
  static inline Int middle() { return _mm512_set1_epi32(B == mopeq::CODEBOOK ? mopeq::POINT_ZERO : 1 << (B - 1)); }
  static inline Int join(Int hi, Int lo) { return _mm512_add_epi32(_mm512_slli_epi32(hi, 7), lo); }
  static inline Float halves(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  }
  static inline Float brain(const uint16_t *p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static inline Float load(const float *p) { return _mm512_loadu_ps(p); }
  static inline Float none() { return _mm512_setzero_ps(); }
  static inline Float fma(Int d, float s, Float acc) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), _mm512_set1_ps(s), acc);
  }
  static inline Float fma(Float x, Float y, Float acc) { return _mm512_fmadd_ps(x, y, acc); }
  static inline void store(float *p, Float v) { _mm512_storeu_ps(p, v); }
};

void read(const void *data, int64_t bytes, uint64_t *sum) {
  const auto *p = static_cast<const char *>(data);
  __m512i s[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int k = 0; k < 4; k++) {
      _mm_prefetch(p + i + AHEAD + 64 * k, _MM_HINT_T0);
      s[k] = _mm512_xor_si512(s[k], _mm512_loadu_si512(p + i + 64 * k));
    }
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(s[0], s[1]), _mm512_xor_si512(s[2], s[3]));
  *sum = uint64_t(_mm512_reduce_add_epi64(all));
}

}  // namespace

const mopeq::Kernels &mopeq::avx512_kernels() {
  static const Kernels made = [] {
    Kernels all = kernels<Once<Avx2>, Avx512>(read);
    tiles<Avx512>(all);
    return all;
  }();
  return made;
}
