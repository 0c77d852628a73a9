// Draws tokens. Only a row's own logits and its uniform number decide: temperature, then top-k, then
// top-p of what that left, then min-p, then the inverse of the cumulative distribution in the order
// of the ids. No row is sorted: a histogram over the leading bits of the weights finds the group in
// which a filter ends, and that group alone is put in order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace tokenry {
namespace {

constexpr int kShift = 19;  // of a weight's bits: 16 groups for each power of two
constexpr int kGroups = (0x3f800000 >> kShift) + 1;  // a weight is at most 1

struct Ranked {
  float weight;
  int32_t id;
  // Larger weights first, of equals the lower id.
  bool operator<(const Ranked& other) const {
    return weight > other.weight || (weight == other.weight && id < other.id);
  }
};

int group_of(float weight) {
  int32_t bits;
  memcpy(&bits, &weight, 4);
  return bits >> kShift;
}

struct Group {
  int64_t count;
  double mass;
};

struct Row {
  const float* weights;
  int64_t size;
  std::vector<Group>& groups;
  std::vector<Ranked>& members;

  void collect(int group) {
    members.clear();
    for (int64_t i = 0; i < size; i++)
      if (group_of(weights[i]) == group) members.push_back({weights[i], int32_t(i)});
    std::sort(members.begin(), members.end());
  }

  // The last of the k largest, and the mass of the k.
  Ranked kth(int64_t k, double& mass) {
    int64_t before = 0;
    mass = 0;
    int g = kGroups - 1;
    for (; g > 0 && before + groups[g].count < k; g--) {
      before += groups[g].count;
      mass += groups[g].mass;
    }
    collect(g);
    const int64_t left = std::min<int64_t>(k - before, members.size());
    for (int64_t i = 0; i < left; i++) mass += members[i].weight;
    return members[left - 1];
  }

  // The last one before which less than `target` lies, no later than `bound`.
  Ranked covering(double target, const Ranked& bound) {
    double before = 0;
    int g = kGroups - 1;
    for (; g > group_of(bound.weight) && before + groups[g].mass < target; g--)
      before += groups[g].mass;
    collect(g);
    if (members.empty()) return bound;
    Ranked last = members.front();
    for (const Ranked& one : members) {
      if (before >= target || bound < one) break;
      last = one;
      before += one.weight;
    }
    return last;
  }
};

}  // namespace
}  // namespace tokenry

using namespace tokenry;

// ids [rows] from logits [rows, size]; per row temperature (0: the largest), top_k (0: off), top_p,
// min_p, uniform in [0, 1). broken [rows]: 1 where the largest logit is infinite or one is NaN.
API void tk_sample(const float* logits, int64_t rows, int64_t size, const float* temperature,
                   const int32_t* top_k, const float* top_p, const float* min_p,
                   const float* uniform, int32_t* ids, uint8_t* broken) {
  const Kernels& isa = kernels();
  parallel(rows, [&](int64_t r) {
    const float* x = logits + r * size;
    bool odd;
    const int64_t best = isa.argmax(x, size, &odd);
    broken[r] = odd;
    ids[r] = int32_t(best);
    if (temperature[r] == 0 || !(x[best] > -INFINITY)) return;
    static thread_local std::vector<float> weights;
    static thread_local std::vector<Group> groups(kGroups);
    static thread_local std::vector<Ranked> members;
    weights.resize(size);
    float* w = weights.data();
    isa.boltzmann(x, size, x[best], temperature[r], w);
    for (int64_t i = 0; i < size; i++) w[i] = w[i] == w[i] ? w[i] : 0.0f;  // a NaN is never drawn
    const bool by_rank = (top_k[r] > 0 && top_k[r] < size) || top_p[r] < 1;
    if (by_rank) {
      std::fill(groups.begin(), groups.end(), Group{});
      for (int64_t i = 0; i < size; i++) {
        Group& g = groups[group_of(w[i])];
        g.count++;
        g.mass += w[i];
      }
      Row row{w, size, groups, members};
      Ranked last{0, int32_t(size)};
      double mass = 0;
      if (top_k[r] > 0 && top_k[r] < size) {
        last = row.kth(top_k[r], mass);
      } else {
        for (const Group& g : groups) mass += g.mass;
      }
      if (top_p[r] < 1) last = row.covering(double(top_p[r]) * mass, last);
      for (int64_t i = 0; i < size; i++)
        if (last < Ranked{w[i], int32_t(i)}) w[i] = 0;
    }
    if (min_p[r] > 0) {
      for (int64_t i = 0; i < size; i++)
        if (w[i] < min_p[r]) w[i] = 0;
    }
    double total = 0;
    for (int64_t i = 0; i < size; i++) total += w[i];
    const double target = double(uniform[r]) * total;
    double mass = 0;
    int64_t drawn = best;
    for (int64_t i = 0; i < size; i++) {
      mass += w[i];
      if (w[i] > 0) drawn = i;
      if (mass > target) break;
    }
    ids[r] = int32_t(drawn);
  });
}
