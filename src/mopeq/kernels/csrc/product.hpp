// A product of rows with the matrices of their experts: checks, activations to digits, panels handed out to threads.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernels.hpp"
#include "memory.hpp"
#include "mopeq_cpu.h"

namespace mopeq {

constexpr int64_t LIMIT = int64_t(1) << 31;  // of rows, inputs, experts: products stay in int64

const Kernels *table_of(int isa);  // null where this machine or build lacks it
int isa();
int best_isa();
void use_isa(int isa);
inline const Loops &loops() { return table_of(isa())->loops; }

inline bool misaligned(const void *p, uintptr_t to) { return reinterpret_cast<uintptr_t>(p) % to != 0; }
inline int64_t size_of(int64_t type) { return type == MOPEQ_F32 ? 4 : 2; }
// Buffers of a group; its matrices are checked when they are used.
int check(const mopeq_group &group, int64_t inputs);

// Digits of an activation; matrices of up to `coarse` bits use the first alone.
struct Digits {
  int64_t count, coarse;
  bool exist() const { return count >= 1 && count <= MAX_DIGITS && coarse >= 0 && coarse <= (count == 2 ? 8 : 0); }
};

// Rows of activations: in float32, and as digits.
struct Inputs {
  int64_t rows, inputs;
  Digits digits;
  bool rotated;
  float *wide;  // (rows, inputs)
  int8_t *split;
  float *scales;
  int32_t *minus;
  std::unique_ptr<Memory> memory;

  Inputs(int64_t rows, int64_t inputs, Digits digits, bool rotated = false);  // std::bad_alloc
  Activations view() const { return {split, scales, minus, inputs / BLOCK}; }
};

// Fills row `row` of the float32 rows, which are rotated then if that is wanted.
using Source = void (*)(int64_t row, float *to, const void *context);
void fill(const Inputs &to, int64_t threads, Source source, const void *context);

// A matrix that has rows, and the pieces it is handed out in.
struct Part {
  const mopeq_matrix *matrix;
  int64_t begin, end;     // rows of out
  int64_t column;         // of out
  int64_t first, panels;  // number of its first piece; panels a piece
};

// Rows offsets[e] to offsets[e + 1] of `out` times expert e.
struct Product {
  const mopeq_group *group;
  const Kernels *kernels;
  const Inputs *x = nullptr, *rotated = nullptr;  // what its matrices want
  const int64_t *rows = nullptr;  // the row of x for each row of out
  float *out = nullptr;
  int64_t out_features = 0;
  std::vector<Part> parts{};
  int64_t pieces = 0, bytes = 0;
  bool wants_plain = false, wants_rotated = false;

  Product(const mopeq_group &of) : group(&of), kernels(table_of(isa())) {}
  // Checks every matrix that has rows, and that it has so many outputs.
  int plan(const int64_t *offsets, int64_t inputs, int64_t outputs);
};

// The rows of a product's inputs as its matrices want them: as they are, rotated, or both.
struct Filled {
  std::unique_ptr<Inputs> plain, rotated;

  // Once it is planned.
  Filled(Product &product, int64_t rows, int64_t inputs, Digits digits, int64_t threads, Source source,
         const void *context);
};

// Products that do not wait for each other.
void run(const Product *products, int64_t count, int64_t threads);

}  // namespace mopeq
