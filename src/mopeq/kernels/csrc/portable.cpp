// Any machine: plain C++, the definition that the other instruction sets are held to, bit for bit.
#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "mopeq_cpu.h"

namespace {

struct Portable {
  struct Code { uint8_t v[32]; };
  struct Int { int32_t v[8]; };
  struct Float { float v[8]; };

  template <int B, int LINE>
  static inline void unpack(const uint8_t *w, Code *c) {
    for (int i = 0; i < 32; i++) {
      const auto line = [&](int n) { return unsigned(w[n * LINE + i]); };
      for (int k = 0; k < 8; k++) {
        unsigned v;
        if constexpr (B == 2) v = line(k / 4) >> (2 * (k % 4)) & 3;
        if constexpr (B == 3) {
          const unsigned rest = line(0) >> 6 | line(1) >> 6 << 2 | line(2) >> 6 << 4;
          v = (k < 6 ? line(k / 2) >> (3 * (k % 2)) : rest >> (3 * (k - 6))) & 7;
        }
        if constexpr (B == 4 || B == 5 || B == 6) v = line(k / 2) >> (4 * (k % 2)) & 15;
        if constexpr (B == 5) v |= (line(4) >> k & 1) << 4;
        if constexpr (B == 6) v |= (line(4 + k / 4) >> (2 * (k % 4)) & 3) << 4;
        if constexpr (B == 8) v = line(k);
        if constexpr (B == mopeq::CODEBOOK) v = mopeq::POINTS[k % 2][line(k / 4) >> (4 * (k / 2 % 2)) & 15];
        c[k].v[i] = uint8_t(v);
      }
    }
  }
  template <int B>
  static inline Int dot(const Code *c, const int8_t *q, Int z, int32_t minus) {
    Int sum;
    for (int r = 0; r < 8; r++) {
      int32_t s = z.v[r] * minus;
      for (int k = 0; k < 8; k++)
        for (int j = 0; j < 4; j++) s += c[k].v[4 * r + j] * q[4 * k + j];
      sum.v[r] = s;
    }
    return sum;
  }
  template <int B>
  static inline Int zeros(const uint8_t *p) {
    uint64_t word = 0;
    for (int i = 0; i < B; i++) word |= uint64_t(p[i]) << (8 * i);
    Int z;
    for (int r = 0; r < 8; r++) z.v[r] = int32_t(word >> (B * r) & ((1u << B) - 1));
    return z;
  }
  template <int B>
  static inline Int middle() {
    Int z;
    for (int r = 0; r < 8; r++) z.v[r] = B == mopeq::CODEBOOK ? mopeq::POINT_ZERO : 1 << (B - 1);
    return z;
  }
  static inline Int join(Int hi, Int lo) {
    for (int r = 0; r < 8; r++) lo.v[r] += hi.v[r] * 128;
    return lo;
  }
  static inline Float halves(const uint16_t *p) {
    Float f;
    for (int r = 0; r < 8; r++) {
      const uint32_t sign = uint32_t(p[r] & 0x8000) << 16, rest = p[r] & 0x7fff;
      float v;
      if (rest < 0x400) {
        v = float(rest) * 0x1p-24f;
        uint32_t b;
        std::memcpy(&b, &v, 4);
        b |= sign;
        std::memcpy(&v, &b, 4);
      } else {
        const uint32_t b = sign | (rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + 0x38000000);
        std::memcpy(&v, &b, 4);
      }
      f.v[r] = v;
    }
    return f;
  }
  static inline Float brain(const uint16_t *p) {
    Float f;
    for (int r = 0; r < 8; r++) {
      const uint32_t b = uint32_t(p[r]) << 16;
      std::memcpy(&f.v[r], &b, 4);
    }
    return f;
  }
  static inline Float load(const float *p) {
    Float f;
    std::memcpy(f.v, p, sizeof f.v);
    return f;
  }
  static inline Float none() { return Float{}; }
  static inline Float fma(Int d, float s, Float acc) {
    for (int r = 0; r < 8; r++) acc.v[r] = std::fmaf(float(d.v[r]), s, acc.v[r]);
    return acc;
  }
  static inline Float fma(Float x, Float y, Float acc) {
    for (int r = 0; r < 8; r++) acc.v[r] = std::fmaf(x.v[r], y.v[r], acc.v[r]);
    return acc;
  }
  static inline void store(float *p, Float v) { std::memcpy(p, v.v, sizeof v.v); }
};

#include "loops.inc"
#include "grids.inc"
#include "panel.inc"

void read(const void *data, int64_t bytes, uint64_t *sum) {
  const auto *p = static_cast<const uint8_t *>(data);
  uint64_t s[4] = {};
  for (int64_t i = 0; i + 32 <= bytes; i += 32)
    for (int k = 0; k < 4; k++) {
      uint64_t v;
      std::memcpy(&v, p + i + 8 * k, 8);
      s[k] ^= v;
    }
  *sum = s[0] ^ s[1] ^ s[2] ^ s[3];
}

}  // namespace

const mopeq::Kernels &mopeq::portable_kernels() {
  static const Kernels made = kernels<Once<Portable>, Twice<Portable>>(read);
  return made;
}
