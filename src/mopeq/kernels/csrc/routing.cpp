// A router, its choice, and the experts it chooses.
#include "routing.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "experts.hpp"
#include "product.hpp"
#include "threads.hpp"

namespace mopeq {
namespace {

constexpr int64_t EACH = 8;        // rows of the router that a thread takes at a time
constexpr int64_t FEW = 1 << 16;   // products that are not worth waking threads

struct Scoring {
  const mopeq_moe_job *job;
  const Kernels *kernels;
  const float *x;  // (tokens, hidden)
  float *scores;   // (tokens, experts)
};

void scoring(int64_t begin, int64_t end, void *context) {
  const Scoring &s = *static_cast<Scoring *>(context);
  const mopeq_moe_job &job = *s.job;
  const int64_t count = job.experts.down.experts, hidden = job.experts.hidden;
  for (int64_t piece = begin; piece < end; piece++) {
    const int64_t first = piece * EACH, height = std::min(EACH, count - first);
    for (int64_t t = 0; t < job.experts.tokens; t++) {
      float *to = s.scores + t * count + first;
      if (job.router_type == MOPEQ_F32)
        s.kernels->wide(static_cast<const float *>(job.router) + first * hidden, height, hidden, s.x, &t, to, count);
      else
        s.kernels->dense[0](static_cast<const uint16_t *>(job.router) + first * hidden, height, hidden, s.x, &t, to,
                            count);
    }
  }
}

// To `type` and back.
void round(float *x, int64_t type, int64_t count, std::vector<uint16_t> &scratch) {
  if (type == MOPEQ_F32) return;
  scratch.resize(size_t(count));
  loops().narrow(x, type, count, scratch.data());
  loops().widen(scratch.data(), type, count, x);
}

// One token's experts and their weights; its scores become probabilities.
void choose(const mopeq_moe_job &job, float *scores, std::vector<int64_t> &order, int64_t *index, float *weights) {
  const int64_t count = job.experts.down.experts, k = job.experts.k;
  const float top = *std::max_element(scores, scores + count);
  for (int64_t e = 0; e < count; e++) scores[e] -= top;
  loops().exponentials(scores, count);
  const float sum = std::accumulate(scores, scores + count, 0.0f);
  for (int64_t e = 0; e < count; e++) scores[e] /= sum;
  std::iota(order.begin(), order.end(), 0);
  if (sum == sum)  // undefined numbers have no order; they reach the result through the weights
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int64_t a, int64_t b) {
      return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
    });
  float chosen = 0.0f;
  for (int64_t i = 0; i < k; i++) index[i] = order[size_t(i)], chosen += weights[i] = scores[index[i]];
  for (int64_t i = 0; job.normalized && i < k; i++) weights[i] /= chosen;
}

}  // namespace

int moe(const mopeq_moe_job &job) {
  const mopeq_experts_job &given = job.experts;
  const int64_t count = given.down.experts, hidden = given.hidden;
  if (!job.router || !given.x) return MOPEQ_NULL;
  if (job.router_type != MOPEQ_F32 && job.router_type != MOPEQ_BF16) return MOPEQ_TYPE;
  if (given.x_type < MOPEQ_F32 || given.x_type > MOPEQ_F16) return MOPEQ_TYPE;
  if (given.tokens < 0 || given.tokens >= LIMIT || hidden < BLOCK || hidden % BLOCK || hidden >= LIMIT || count < 1 ||
      count >= LIMIT || given.k < 1 || given.k > count)
    return MOPEQ_SHAPE;
  if (misaligned(job.router, uintptr_t(size_of(job.router_type))) || misaligned(given.x, uintptr_t(size_of(given.x_type))))
    return MOPEQ_ALIGN;
  std::vector<float> x(size_t(given.tokens * hidden)), scores(size_t(given.tokens * count));
  loops().widen(given.x, given.x_type, given.tokens * hidden, x.data());
  Scoring context{&job, table_of(isa()), x.data(), scores.data()};
  run((count + EACH - 1) / EACH, given.tokens * count * hidden < FEW ? 1 : given.threads, scoring, &context);

  std::vector<int64_t> index(size_t(given.tokens * given.k)), order(size_t(count), 0);
  std::vector<float> weights(index.size());
  std::vector<uint16_t> scratch;
  round(scores.data(), given.x_type, int64_t(scores.size()), scratch);
  for (int64_t t = 0; t < given.tokens; t++)
    choose(job, scores.data() + t * count, order, index.data() + t * given.k, weights.data() + t * given.k);
  if (job.rounded) round(weights.data(), given.x_type, int64_t(weights.size()), scratch);
  mopeq_experts_job chosen = given;
  chosen.index = index.data(), chosen.weights = weights.data();
  return experts(chosen);
}

}  // namespace mopeq
