// Threads that share the work of one kernel. Chunks are claimed one by one, so a thread that the
// kernel of the operating system has taken off its core delays one chunk and not the whole job.
#pragma once
#include <cstdint>
#include <type_traits>
#include <vector>

namespace tokenry {

// The threads of a job, the caller among them. Takes effect with the next job; at least 1.
void set_threads(int count);
int get_threads();

// The CPUs of each memory node, so that a thread stays on one. For threads that start later.
void set_nodes(std::vector<std::vector<int>> nodes);

using Chunk = void (*)(void* context, int64_t index);

// Runs chunk(context, i) for i in [0, count), on all threads; returns when all are done.
// A call from within a job, or beside another thread's job, runs on the caller alone.
void run(Chunk chunk, void* context, int64_t count);

// parallel(n, [&](int64_t i) { ... })
template <class Body>
inline void parallel(int64_t count, Body&& body) {
  if (count <= 1 || get_threads() == 1) {
    for (int64_t i = 0; i < count; i++) body(i);
    return;
  }
  using Plain = std::remove_reference_t<Body>;
  auto* context = const_cast<std::remove_const_t<Plain>*>(&body);
  run([](void* at, int64_t index) { (*static_cast<Plain*>(at))(index); }, context, count);
}

}  // namespace tokenry
