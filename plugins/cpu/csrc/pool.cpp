#include "pool.h"

#include <pthread.h>

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

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// One word holds job number (16 bits), chunks (24) and next chunk (24), so that claiming a chunk
// says at once of which job it is. A job's description is not written again before all of its
// chunks are done, therefore a claim below the count may read it.
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

  // After fork() only the caller's thread exists.
  void forget_threads() {
    new (&busy_) std::mutex;
    new (&sleep_) std::mutex;
    new (&wake_) std::condition_variable;
    started_ = 0;
    sleepers_.store(0);
  }

 private:
  void job(Chunk chunk, void* context, int64_t from, int64_t count) {
    chunk_ = chunk;
    context_ = context;
    from_ = from;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(Ticket::make(++jobs_, count), std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    inside_ = true;
    work();
    inside_ = false;
    for (int spins = 0; done_.load(std::memory_order_acquire) < count; spins++) {
      if (spins < 2000) {
        relax();
      } else {
        std::this_thread::yield();  // whoever has the last chunk may be waiting for this core
      }
    }
  }

  // Claims chunks until none is left; true if there was one.
  bool work() {
    bool any = false;
    for (;;) {
      uint64_t word = ticket_.load(std::memory_order_acquire);
      if (Ticket::next(word) >= Ticket::count(word)) return any;
      if (!ticket_.compare_exchange_weak(word, word + 1, std::memory_order_acq_rel)) continue;
      chunk_(context_, from_ + Ticket::next(word));
      done_.fetch_add(1, std::memory_order_release);
      any = true;
    }
  }

  bool idle() const {
    uint64_t word = ticket_.load(std::memory_order_seq_cst);
    return Ticket::next(word) >= Ticket::count(word);
  }

  void loop(int number) {
    inside_ = true;
    auto last = std::chrono::steady_clock::now();
    for (;;) {
      if (number >= size()) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return number < size() && !idle(); });
        sleepers_.fetch_sub(1);
      }
      if (work()) {
        last = std::chrono::steady_clock::now();
        continue;
      }
      for (int i = 0; i < 32; i++) relax();
      if (std::chrono::steady_clock::now() - last < kSpin) continue;
      std::unique_lock<std::mutex> lock(sleep_);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, [&] { return !idle(); });
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      last = std::chrono::steady_clock::now();
    }
  }

  void start_missing() {
    for (; started_ < size() - 1; started_++) {
      int number = started_ + 1;
      std::thread([this, number] { loop(number); }).detach();
    }
  }

  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> wanted_{1}, sleepers_{0};
  int started_ = 0;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> done_{0};
  uint64_t jobs_ = 0;
  Chunk chunk_ = nullptr;
  void* context_ = nullptr;
  int64_t from_ = 0;
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
int get_threads() { return pool().size(); }
void run(Chunk chunk, void* context, int64_t count) { pool().run(chunk, context, count); }

}  // namespace tokenry
