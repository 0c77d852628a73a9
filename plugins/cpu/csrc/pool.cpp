#include "pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tokenry {
namespace {

// A worker that found nothing spins this long before it sleeps: longer than the gap between two
// kernels of a step, far shorter than a scheduler's time slice.
constexpr auto kSpin = std::chrono::microseconds(60);
constexpr int64_t kMaxChunks = (int64_t{1} << 24) - 1;
constexpr int kMaxRanges = 64;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// A job's chunks are divided into ranges, one for each thread: the same thread takes the same part
// of each job of as many chunks (so what it packed lies in the memory of its own node), and helps
// the others when it is through. One word of a range holds job number (16 bits), chunks (24) and
// next chunk (24), so that claiming a chunk says at once of which job it is. A job's description is
// not written again before all of its chunks are done, therefore a claim below the count may read
// it.
struct Ticket {
  static uint64_t make(uint64_t job, uint64_t count) { return job << 48 | count << 24; }
  static int64_t count(uint64_t word) { return word >> 24 & 0xffffff; }
  static int64_t next(uint64_t word) { return word & 0xffffff; }
};

class Pool {
 public:
  void run(Chunk chunk, void* context, int64_t count) {
    std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (!alone.owns_lock() || inside_) {
      for (int64_t i = 0; i < count; i++) chunk(context, i);
      return;
    }
    start_missing();
    for (int64_t from = 0; from < count; from += kMaxChunks) {
      job(chunk, context, from, std::min(kMaxChunks, count - from));
    }
  }

  void resize(int count) {
    std::lock_guard<std::mutex> alone(busy_);
    wanted_.store(count < 1 ? 1 : count, std::memory_order_relaxed);
  }

  int size() const { return wanted_.load(std::memory_order_relaxed); }

  // Threads that start from now on run on the CPUs of their node only.
  void place(std::vector<std::vector<int>> nodes) {
    std::lock_guard<std::mutex> alone(busy_);
    nodes_ = std::move(nodes);
  }

  // After fork() only the caller's thread exists.
  void forget_threads() {
    new (&busy_) std::mutex;
    new (&sleep_) std::mutex;
    new (&wake_) std::condition_variable;
    started_ = 0;
    sleepers_.store(0);
  }

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> ticket{0};
  };

  int64_t begin(int range) const {
    return from_ + count_ * range / ranges_.load(std::memory_order_relaxed);
  }

  void job(Chunk chunk, void* context, int64_t from, int64_t count) {
    chunk_ = chunk;
    context_ = context;
    from_ = from;
    count_ = count;
    const int ranges = std::min(size(), kMaxRanges);
    ranges_.store(ranges, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t number = ++jobs_;
    for (int i = 0; i < ranges; i++) {
      range_[i].ticket.store(Ticket::make(number, begin(i + 1) - begin(i)),
                             std::memory_order_release);
    }
    published_.store(number, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    inside_ = true;
    work(0, ranges);
    inside_ = false;
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; spins++) {
      if (spins < 2000) {
        relax();
      } else {
        std::this_thread::yield();  // whoever has the last chunk may be waiting for this core
      }
    }
  }

  // Claims chunks until none is left, first those of its own range; true if there was one.
  bool work(int own, int ranges) {
    bool any = false;
    for (int i = 0; i < ranges; i++) {
      const int at = (own + i) % ranges;
      std::atomic<uint64_t>& ticket = range_[at].ticket;
      for (;;) {
        uint64_t word = ticket.load(std::memory_order_acquire);
        if (Ticket::next(word) >= Ticket::count(word)) break;
        if (!ticket.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
        chunk_(context_, begin(at) + Ticket::next(word));
        done_.fetch_add(1, std::memory_order_release);
        any = true;
      }
    }
    return any;
  }

  void loop(int number, uint64_t seen) {
    inside_ = true;
    auto last = std::chrono::steady_clock::now();
    for (;;) {
      if (number >= size()) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return number < size() && published_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
      const uint64_t now = published_.load(std::memory_order_seq_cst);
      if (now != seen) {
        seen = now;
        work(number, ranges_.load(std::memory_order_relaxed));
        last = std::chrono::steady_clock::now();
        continue;
      }
      for (int i = 0; i < 32; i++) relax();
      if (std::chrono::steady_clock::now() - last < kSpin) continue;
      std::unique_lock<std::mutex> lock(sleep_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return published_.load(std::memory_order_seq_cst) != seen; });
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      last = std::chrono::steady_clock::now();
    }
  }

  // To the CPUs of its node: neighbouring threads share one.
  void settle(int number) {
#if defined(__linux__)
    if (nodes_.size() < 2) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int cpu : nodes_[size_t(number) * nodes_.size() / size_t(std::max(number + 1, size()))])
      if (cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);  // where it may not, it runs wherever it is put
#else
    (void)number;
#endif
  }

  void start_missing() {
    for (; started_ < size() - 1; started_++) {
      int number = started_ + 1;
      const uint64_t seen = published_.load();
      std::thread([this, number, seen] {
        settle(number);
        loop(number, seen);
      }).detach();
    }
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> wanted_{1}, sleepers_{0};
  int started_ = 0;
  Range range_[kMaxRanges];
  std::atomic<uint64_t> published_{0};
  std::atomic<int64_t> done_{0};
  uint64_t jobs_ = 0;
  Chunk chunk_ = nullptr;
  void* context_ = nullptr;
  int64_t from_ = 0, count_ = 0;
  std::atomic<int> ranges_{1};
  std::vector<std::vector<int>> nodes_;
  static thread_local bool inside_;
};

thread_local bool Pool::inside_ = false;

// Never destroyed: its threads run until the process ends.
Pool& pool() {
  static Pool* instance = [] {
    auto* made = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool().forget_threads(); });
    return made;
  }();
  return *instance;
}

}  // namespace

void set_threads(int count) { pool().resize(count); }
void set_nodes(std::vector<std::vector<int>> nodes) { pool().place(std::move(nodes)); }
int get_threads() { return pool().size(); }
void run(Chunk chunk, void* context, int64_t count) { pool().run(chunk, context, count); }

}  // namespace tokenry
