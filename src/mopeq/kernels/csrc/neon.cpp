// ARMv8.2 with products of four bytes (dotprod). 8 rows are two registers of each kind.
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "kernels.hpp"
#include "mopeq_cpu.h"

namespace {

struct Neon {
  struct Code { uint8x16_t v[2]; };
  struct Int { int32x4_t v[2]; };
  struct Float { float32x4_t v[2]; };

  // Bits of every byte, moved down, or up where `down` is negative.
  static inline uint8x16_t field(uint8x16_t v, int down, int mask) {
    return vandq_u8(vshlq_u8(v, vdupq_n_s8(int8_t(-down))), vdupq_n_u8(uint8_t(mask)));
  }

  template <int B, int LINE>
  static inline void unpack(const uint8_t *w, Code *c) {
    for (int h = 0; h < 2; h++) {
      const auto line = [&](int n) { return vld1q_u8(w + n * LINE + 16 * h); };
      for (int k = 0; k < 8; k++) {
        uint8x16_t &v = c[k].v[h];
        if constexpr (B == 2) v = field(line(k / 4), 2 * (k % 4), 3);
        if constexpr (B == 3) {
          if (k < 6) {
            v = field(line(k / 2), 3 * (k % 2), 7);
          } else {
            const uint8x16_t rest = vorrq_u8(field(line(0), 6, 3), vorrq_u8(field(line(1), 4, 12), field(line(2), 2, 48)));
            v = field(rest, 3 * (k - 6), 7);
          }
        }
        if constexpr (B == 4 || B == 5 || B == 6) v = field(line(k / 2), 4 * (k % 2), 15);
        if constexpr (B == 5) v = vorrq_u8(v, field(line(4), k - 4, 16));
        if constexpr (B == 6) v = vorrq_u8(v, field(line(4 + k / 4), 2 * (k % 4) - 4, 48));
        if constexpr (B == 8) v = veorq_u8(line(k), vdupq_n_u8(128));  // as signed bytes, 128 less; so is the zero point
        if constexpr (B == mopeq::CODEBOOK)
          v = vqtbl1q_u8(vld1q_u8(mopeq::POINTS[k % 2]), field(line(k / 4), 4 * (k / 2 % 2), 15));
      }
    }
  }
  template <int B>
  static inline Int dot(const Code *c, const int8_t *q, Int z, int32_t minus) {
    const int8x16_t a = vld1q_s8(q), b = vld1q_s8(q + 16);
    for (int h = 0; h < 2; h++) {
      const auto code = [&](int k) { return vreinterpretq_s8_u8(c[k].v[h]); };
      int32x4_t even = vmulq_n_s32(z.v[h], minus), odd = vdotq_laneq_s32(vdupq_n_s32(0), code(1), a, 1);
      even = vdotq_laneq_s32(even, code(0), a, 0);
      even = vdotq_laneq_s32(even, code(2), a, 2), odd = vdotq_laneq_s32(odd, code(3), a, 3);
      even = vdotq_laneq_s32(even, code(4), b, 0), odd = vdotq_laneq_s32(odd, code(5), b, 1);
      even = vdotq_laneq_s32(even, code(6), b, 2), odd = vdotq_laneq_s32(odd, code(7), b, 3);
      z.v[h] = vaddq_s32(even, odd);
    }
    return z;
  }
  template <int B>
  static inline Int zeros(const uint8_t *p) {
    uint64_t word = 0;
    std::memcpy(&word, p, B);
    const int32x4_t down = {0, -B, -2 * B, -3 * B};
    Int z;
    for (int h = 0; h < 2; h++) {
      const uint32x4_t v = vshlq_u32(vdupq_n_u32(uint32_t(word >> (4 * B * h))), down);
      z.v[h] = vreinterpretq_s32_u32(vandq_u32(v, vdupq_n_u32((1u << B) - 1)));
      if constexpr (B == 8) z.v[h] = vsubq_s32(z.v[h], vdupq_n_s32(128));
    }
    return z;
  }
  template <int B>
  static inline Int middle() {
    const int32x4_t v = vdupq_n_s32(B == mopeq::CODEBOOK ? int(mopeq::POINT_ZERO) : B == 8 ? 0 : 1 << (B - 1));
    return {{v, v}};
  }
  static inline Int join(Int hi, Int lo) {
    for (int h = 0; h < 2; h++) lo.v[h] = vaddq_s32(vshlq_n_s32(hi.v[h], 7), lo.v[h]);
    return lo;
  }
  static inline Float halves(const uint16_t *p) {
    return {{vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4)))}};
  }
  static inline Float brain(const uint16_t *p) {
    const uint32x4_t a = vshll_n_u16(vld1_u16(p), 16), b = vshll_n_u16(vld1_u16(p + 4), 16);
    return {{vreinterpretq_f32_u32(a), vreinterpretq_f32_u32(b)}};
  }
  static inline Float load(const float *p) { return {{vld1q_f32(p), vld1q_f32(p + 4)}}; }
  static inline Float none() { return {{vdupq_n_f32(0), vdupq_n_f32(0)}}; }
  static inline Float fma(Int d, float s, Float acc) {
    for (int h = 0; h < 2; h++) acc.v[h] = vfmaq_n_f32(acc.v[h], vcvtq_f32_s32(d.v[h]), s);
    return acc;
  }
  static inline Float fma(Float x, Float y, Float acc) {
    for (int h = 0; h < 2; h++) acc.v[h] = vfmaq_f32(acc.v[h], x.v[h], y.v[h]);
    return acc;
  }
  static inline void store(float *p, Float v) { vst1q_f32(p, v.v[0]), vst1q_f32(p + 4, v.v[1]); }
};

#include "loops.inc"
#include "grids.inc"
#include "panel.inc"

void read(const void *data, int64_t bytes, uint64_t *sum) {
  const auto *p = static_cast<const uint8_t *>(data);
  uint8x16_t s[4] = {};
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    __builtin_prefetch(p + i + AHEAD);
    for (int k = 0; k < 4; k++) s[k] = veorq_u8(s[k], vld1q_u8(p + i + 16 * k));
  }
  const uint64x2_t all = vreinterpretq_u64_u8(veorq_u8(veorq_u8(s[0], s[1]), veorq_u8(s[2], s[3])));
  *sum = vgetq_lane_u64(all, 0) ^ vgetq_lane_u64(all, 1);
}

}  // namespace

const mopeq::Kernels &mopeq::neon_kernels() {
  static const Kernels made = kernels<Once<Neon>, Twice<Neon>>(read);
  return made;
}
