// How keys and values lie in blocks, how they are written, and how the blocks of a chunk are found
// for attention.
namespace tokenry::NS {

INLINE int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t even_up(int64_t n) { return n + n % 2; }

// bf16 lies in pairs, as one instruction multiplies them: neighbouring values of a key, neighbouring
// keys' values. int8 lies alike and is worked on as bf16, which has room for each of its values.
template <class T>
constexpr bool kPaired = false;
template <>
inline constexpr bool kPaired<bf16> = true;
template <>
inline constexpr bool kPaired<int8_t> = true;

template <class T>
struct Worked {
  using type = T;
};
template <>
struct Worked<int8_t> {
  using type = bf16;
};

template <class T>
struct Block {
  T* base;
  int64_t size, head_dim, half, kv_heads;  // half: of a head's share of a block
  Block(const Attention& a)
      : base(static_cast<T*>(a.kv)),
        size(a.block_size),
        head_dim(a.head_dim),
        half(size * ((kPaired<T> ? even_up(head_dim) : head_dim) +
                     (sizeof(T) == 1 ? int64_t(sizeof(float)) : 0))),
        kv_heads(a.kv_heads) {}
  T* keys(int64_t block, int64_t head) const { return base + (block * kv_heads + head) * 2 * half; }
  T* values(int64_t block, int64_t head) const { return keys(block, head) + half; }
  // Where value d of key i is, and of the value that belongs to it.
  int64_t in_keys(int64_t i, int64_t d) const {
    return kPaired<T> ? (d / 2 * size + i) * 2 + d % 2 : d * size + i;
  }
  int64_t in_values(int64_t i, int64_t d) const {
    return kPaired<T> ? (i / 2 * head_dim + d) * 2 + i % 2 : i * head_dim + d;
  }
};

// The int8 format's scales, after the keys or the values of a block.
INLINE float* scales_of(const Attention& a, int8_t* keys_or_values) {
  return reinterpret_cast<float*>(keys_or_values + a.block_size * even_up(a.head_dim));
}

// x[0, n) as whole numbers of [-127, 127] times the scale that is returned; zeros follow them in
// the last panel. A NaN or infinity makes the scale NaN.
inline float quantise_row(const float* x, int64_t n, int8_t* out) {
  alignas(64) float last[LANES] = {};
  const int64_t whole = n / LANES * LANES;
  for (int64_t d = whole; d < n; d++) last[d - whole] = x[d];
  const auto at = [&](int64_t d) { return load(d < whole ? x + d : last); };
  vf top{}, check{};
  for (int64_t d = 0; d < n; d += LANES) {
    const vf v = at(d);
    top = max(v < 0.0f ? -v : v, top);
    check += v * 0.0f;
  }
  float most = sum(check) != 0.0f ? NAN : largest(top);
  if (most < 1e-34f) most = 0;  // weights with such a scale would be subnormal
  const float inverse = most > 0 ? 127.0f / most : 0.0f;
  for (int64_t d = 0; d < n; d += LANES) {
    vf v = inverse > 0 ? (at(d) * inverse + 12582912.0f) - 12582912.0f : vf{};
    store(out + d, max(min(v, splat(127.0f)), splat(-127.0f)));
  }
  return most / 127.0f;
}

// Tokens of a pair may be written by two threads: each its own places.
template <class T>
void write_paired(const Attention& a, int64_t token, int64_t head) {
  const Block<T> at(a);
  const int64_t slot = a.slots[token], block = slot / a.block_size, i = slot % a.block_size;
  T* line = static_cast<T*>(scratch((a.head_dim + kPanel) * 2));
  const auto rounded = [&](const float* x, T* block_of_it) {
    if constexpr (sizeof(T) == 1)
      scales_of(a, block_of_it)[i] = quantise_row(x, a.head_dim, line);
    else
      narrow_row(x, a.head_dim, line);
  };
  T *keys = at.keys(block, head), *values = at.values(block, head);
  rounded(a.k + token * a.k_stride + head * a.head_dim, keys);
  for (int64_t d = 0; d < a.head_dim; d += 2)
    memcpy(keys + at.in_keys(i, d), line + d, 2 * sizeof(T));
  rounded(a.v + token * a.v_stride + head * a.head_dim, values);
  values += at.in_values(i, 0);
  for (int64_t d = 0; d < a.head_dim; d++) values[2 * d] = line[d];
}

template <class T>
void write_as(const Attention& a, int64_t token, int64_t head) {
  const Block<T> at(a);
  const int64_t slot = a.slots[token], block = slot / a.block_size, i = slot % a.block_size;
  T *keys = at.keys(block, head) + i, *values = at.values(block, head) + i * a.head_dim;
  const float* k = a.k + token * a.k_stride + head * a.head_dim;
  const float* v = a.v + token * a.v_stride + head * a.head_dim;
  for (int64_t d = 0; d < a.head_dim; d++)
    keys[d * a.block_size] = narrow(k[d], static_cast<T*>(nullptr));
  for (int64_t d = 0; d < a.head_dim; d++) values[d] = narrow(v[d], static_cast<T*>(nullptr));
}

inline void write_kv(const Attention& a, int64_t token, int64_t head) {
  if (a.format == kF32) return write_as<float>(a, token, head);
  if (a.format == kBF16) return write_paired<bf16>(a, token, head);
  if (a.format == kInt8) return write_paired<int8_t>(a, token, head);
  write_as<f16>(a, token, head);
}

// So many blocks before a block is read, memory is asked for it: blocks lie anywhere.
constexpr int64_t kBlocksAhead = 4;

// The blocks of one chunk of keys and of up to kBlocksAhead that are read next, and where they were
// int8 the scales of its keys, of its values and one divided by the latter, kKeys each.
template <class T>
struct Chunk {
  T *keys[kKeys / 16 + kBlocksAhead], *values[kKeys / 16 + kBlocksAhead];
  const float* scales;
  int64_t start, found;
  bool asks;  // for lines: where few rows are few products
};

template <class T>
INLINE void ask_for(const T* block, int64_t bytes) {
  const char* line = reinterpret_cast<const char*>(block);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
}

// Finds the blocks of a chunk and those that are likely read next: the request has `count` keys
// from the chunk's start on, then the next head's turn comes, from block `again` on.
template <class T>
INLINE void find_chunk(const Attention& a, const int32_t* table, int64_t head, int64_t count,
                       int64_t again, Chunk<T>& chunk) {
  const Block<T> blocks(a);
  const int64_t first = chunk.start / a.block_size, size = a.block_size;
  const int64_t here = (count + size - 1) / size, most = kKeys / size + kBlocksAhead;
  const int64_t later = head + 1 < a.kv_heads ? least_of(kBlocksAhead, first + here - again) : 0;
  chunk.found = least_of(here + later, most);
  for (int64_t b = 0; b < chunk.found; b++) {
    const int64_t block = table[b < here ? first + b : again + b - here];
    chunk.keys[b] = blocks.keys(block, head + (b >= here));
    chunk.values[b] = blocks.values(block, head + (b >= here));
  }
}

// Floats of the room that a widened chunk and its scales need, from a line of the cache on.
constexpr int64_t kLine = 64 / sizeof(float);
INLINE int64_t wide_size(const Attention& a) {
  return a.format == kInt8 ? kKeys * even_up(a.head_dim) + 3 * kKeys + kLine : 0;
}

// The blocks of its first `count` keys widened to bf16 in `room`, their scales behind them.
inline void widen_chunk(const Attention& a, const Chunk<int8_t>& from, int64_t count, float* room,
                        Chunk<bf16>& to) {
  const int64_t size = a.block_size, all = size * even_up(a.head_dim);
  bf16* wide = reinterpret_cast<bf16*>(room);
  float* scales = room + kKeys * even_up(a.head_dim);
  for (int64_t b = 0; b * size < count; b++) {
    const int64_t later = b + kBlocksAhead < from.found ? b + kBlocksAhead : b;
    for (int v = 0; v < 2; v++) {
      int8_t* const* blocks = v ? from.values : from.keys;
      for (int64_t i = 0; i < all; i += kPanel) {
        __builtin_prefetch(blocks[later] + i);
        widen_panel(blocks[b] + i, wide + i);
      }
      const float* of = scales_of(a, blocks[b]);
      for (int64_t i = 0; i < size; i += LANES)
        store(scales + v * kKeys + b * size + i, load(of + i));
      (v ? to.values : to.keys)[b] = wide;
      wide += all;
    }
  }
  // a weight of 0 stays 0 whatever was in memory
  for (int64_t t = count; t < kKeys; t++) scales[t] = scales[kKeys + t] = 0.0f;
  for (float* x = scales + kKeys; x < scales + 2 * kKeys; x += LANES) {
    const vf scale = load(x) == 0.0f ? splat(1.0f) : load(x);  // of zeros: any
    store(x, scale);
    store(x + kKeys, 1.0f / scale);
  }
  to.scales = scales;
}

}  // namespace tokenry::NS
