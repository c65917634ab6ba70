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

void read(const void *data, int64_t bytes, uint64_t *sum) {
  const auto *p = static_cast<const char *>(data);
  __m256i s[4] = {};
  for (int64_t i = 0; i + 128 <= bytes; i += 128) {
    _mm_prefetch(p + i + AHEAD, _MM_HINT_T0);
    _mm_prefetch(p + i + AHEAD + 64, _MM_HINT_T0);
    for (int k = 0; k < 4; k++)
      s[k] = _mm256_xor_si256(s[k], _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + i + 32 * k)));
  }
  alignas(32) uint64_t v[4];
  _mm256_store_si256(reinterpret_cast<__m256i *>(v),
                     _mm256_xor_si256(_mm256_xor_si256(s[0], s[1]), _mm256_xor_si256(s[2], s[3])));
  *sum = v[0] ^ v[1] ^ v[2] ^ v[3];
}

}  // namespace

const mopeq::Kernels &mopeq::avx2_kernels() {
  static const Kernels made = kernels<Once<Avx2>, Twice<Avx2>>(read);
  return made;
}
