// C interface of libmopeq_cpu. Layout of the buffers: docs/kernels.md and panels.py.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define MOPEQ_API __declspec(dllexport)
#else
#define MOPEQ_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { MOPEQ_ABI = 9 };

// Type of the activations.
enum { MOPEQ_F32 = 0, MOPEQ_BF16 = 1, MOPEQ_F16 = 2 };

// What a call returns: 0, or the first thing that is wrong.
enum {
  MOPEQ_OK = 0,
  MOPEQ_NULL = 1,      // a pointer that is needed is null
  MOPEQ_SHAPE = 2,     // rows, inputs or counts out of range
  MOPEQ_BITS = 3,      // a width that does not exist
  MOPEQ_GROUP = 4,     // a group size that does not fit
  MOPEQ_RANGE = 5,     // a matrix that lies outside its buffer
  MOPEQ_OFFSETS = 6,   // offsets that decrease or exceed the rows
  MOPEQ_ALIGN = 7,     // a pointer not aligned to its element
  MOPEQ_MEMORY = 8,    // no memory for the activations
  MOPEQ_TYPE = 9,      // an unknown type or number of digits
  MOPEQ_VALUE = 10,    // a number that is not finite, or too large
  MOPEQ_FILE = 11,     // a file that cannot be read, or ends early
};

// How the codes of a matrix are meant: with zero points, without, or as points of the codebook, of 2 bits a weight; and
// whether they are for rotated inputs (hadamard.py).
enum { MOPEQ_ZEROS = 0, MOPEQ_SYMMETRIC = 1, MOPEQ_CODEBOOK = 2, MOPEQ_ROTATED = 4 };

// One matrix of one expert; offsets in elements of the three buffers. Eight int64, as the caller's table has them.
typedef struct {
  int64_t bits, group, kind, rows, inputs, codes, scales, zeros;
} mopeq_matrix;

// The matrices of all experts of a layer in one projection group, and the buffers that they lie in.
typedef struct {
  const uint8_t *codes;
  int64_t codes_size;
  const uint16_t *scales;
  int64_t scales_size;
  const uint8_t *zeros;
  int64_t zeros_size;
  const mopeq_matrix *matrices;  // (experts, matrices of an expert)
  int64_t experts, per_expert;
} mopeq_group;

typedef struct {
  const void *x;  // (rows, inputs) contiguous, of type x_type
  int64_t rows, inputs, x_type;
  mopeq_group group;
  const int64_t *offsets;  // (experts + 1), or null: all rows to the only expert
  void *out;               // (rows, out_features) contiguous, of type x_type
  int64_t out_features;
  int64_t digits;   // int8 digits of an activation, 1 to 3
  int64_t coarse;   // matrices of up to so many bits use the first of 2 digits alone; 0: none
  int64_t threads;  // at most so many
} mopeq_job;

// A layer's experts: out[t] = sum over slots of weights[t][slot] * down(gate(gate_up(x[t]))) of expert
// index[t][slot], added up in float32 in the order of the slots. Indices outside [0, experts) add nothing. With g and u
// of gate_up, biases added: gate(g, u) = (max(min(u, limit), -limit) + shift) * g' * sigmoid(alpha * g'), g' = min(g, limit).
typedef struct {
  const void *x;  // (tokens, hidden) contiguous, of type x_type
  int64_t tokens, hidden, x_type;
  const int64_t *index;  // (tokens, k)
  const float *weights;  // (tokens, k)
  int64_t k;
  mopeq_group gate_up, down;
  const void *gate_up_bias, *down_bias;  // (experts, 2 * inner), (experts, hidden) of type bias_type, or null
  int64_t bias_type, interleaved;        // interleaved: gate_up_bias is g0 u0 g1 u1 ... instead of g0 g1 ... u0 u1 ...
  float alpha, limit, shift;
  void *out;  // (tokens, hidden) contiguous, of type x_type
  int64_t digits, coarse, threads;
} mopeq_experts_job;

// A router and its experts. The router's scores are x router^T, rounded to x_type; of their softmax the k largest (of
// equal ones the first) choose the experts and weigh them. `index` and `weights` of the experts' job are not read.
typedef struct {
  mopeq_experts_job experts;
  const void *router;   // (experts, hidden) of type router_type
  int64_t router_type;  // MOPEQ_F32 or MOPEQ_BF16
  int64_t normalized;   // 1: the k weights are divided by their sum
  int64_t rounded;      // 1: and rounded to x_type
} mopeq_moe_job;

// One token through the attention of a layer, between the sums that surround it:
//   x += add; n = norm(x); q, k, v = projections of n; k, v join the cache at `position`;
//   x += o(attention(q, keys, values)); h = norm(x).
// norm(x) = weight * x / sqrt(mean(x^2) + eps). Rotation pairs the halves of the first `rotated` numbers of a head.
typedef struct {
  float *x;         // (hidden), in and out
  const void *add;  // (hidden) of type `type`, or null
  void *h;          // (hidden) of type `type`
  int64_t type, hidden, heads, kv_heads, size, rotated;  // size: of a head
  float eps, scale;
  const float *norm_before, *norm_after;                // (hidden)
  mopeq_group q, k, v, o;                               // one matrix each
  const float *q_bias, *k_bias, *v_bias, *o_bias;       // or null
  const float *q_norm, *k_norm;                         // both or neither
  int64_t norm_heads;                                   // 1: norms of each head (size); 0: of all heads together
  const float *cos, *sin;                               // (rotated)
  void *keys, *values;                                  // (kv_heads, room, size) of type `type`
  int64_t room, position, digits, coarse, threads;
} mopeq_attention_job;

// Groups of weights, their grids and their codes. A group of w gets w = k * scale, its codes are k + zero; scales are
// fp16 numbers, zero points whole ones.
typedef struct {
  const void *weight;  // (experts, rows, inputs) contiguous, of type `type`
  int64_t type, experts, rows, inputs, groups, bits, symmetric;  // groups of a row
  const float *importance;  // (experts, inputs), weights of the squared errors, none negative, or null: 1
  const float *factors;     // (factor_count) multiples of the scale to try; with none and no refits, min-max grids
  int64_t factor_count, refits;
  float *scale, *zero;  // (experts, rows, groups)
  int64_t given;        // 1: the grids are there, 0: they are made
  uint8_t *codes;       // (experts, rows, inputs), or null
  int64_t threads;
} mopeq_grids_job;

MOPEQ_API int mopeq_abi(void);
// 0 portable; on x86-64 1 AVX2, 2 AVX-512 VNNI; on aarch64 1 NEON with dot products: the best this machine has.
MOPEQ_API int mopeq_best_isa(void);
// Chooses one; not 0 where this machine or build lacks it.
MOPEQ_API int mopeq_use_isa(int isa);
MOPEQ_API int mopeq_isa(void);
// torch's pool: the address of torch_parallel_for, or null for threads of our own.
MOPEQ_API void mopeq_set_parallel_for(void *function);

MOPEQ_API int mopeq_grouped_linear(const mopeq_job *job);
MOPEQ_API int mopeq_experts(const mopeq_experts_job *job);
MOPEQ_API int mopeq_moe(const mopeq_moe_job *job);
MOPEQ_API int mopeq_attention(const mopeq_attention_job *job);

// Plain bit strings (docs/format.md) to panels and back. `to` and `from` must not overlap. scales, zeros: the same for
// the other two parts; a null part is left out. rows a multiple of 8, inputs of 32.
MOPEQ_API int mopeq_repack_codes(const uint8_t *from, uint8_t *to, int64_t rows, int64_t inputs, int64_t bits,
                                 int64_t to_panels, int64_t threads);
MOPEQ_API int mopeq_repack_scales(const uint16_t *from, uint16_t *to, int64_t rows, int64_t groups, int64_t to_panels);
MOPEQ_API int mopeq_repack_zeros(const uint8_t *from, uint8_t *to, int64_t rows, int64_t groups, int64_t bits,
                                 int64_t to_panels);

// What a tensor in a file is: bytes to be taken as they are, or the plain form of one of a matrix's parts.
enum { MOPEQ_PLAIN = 0, MOPEQ_CODES = 1, MOPEQ_SCALES = 2, MOPEQ_POINTS = 3 };

// `bytes` from `begin` on of an open file descriptor, to `to`, a matrix's parts in panels. columns: inputs of codes,
// groups of scales and zero points (MOPEQ_POINTS); bits: of a code.
typedef struct {
  int64_t file, begin, bytes;
  void *to;
  int64_t part, rows, columns, bits;
} mopeq_stored;

// Fills all of them with at most `threads` threads of its own, beside which the caller's may go on.
MOPEQ_API int mopeq_fill(const mopeq_stored *stored, int64_t count, int64_t threads);

// Grids and codes of every group. MOPEQ_VALUE where weights are not finite or too large for fp16 scales;
// the buffers then hold anything.
MOPEQ_API int mopeq_grids(const mopeq_grids_job *job);
// Codes, one a byte, to a bit string of 2 to 8 bits each; `count` a multiple of 8.
MOPEQ_API int mopeq_pack_bits(const uint8_t *codes, uint8_t *to, int64_t count, int64_t bits, int64_t threads);

// The ceiling for benchmarks: reads `bytes` with `threads` threads and returns a checksum. 64-byte aligned.
MOPEQ_API uint64_t mopeq_read(const void *data, int64_t bytes, int64_t threads);

#ifdef __cplusplus
}
#endif
