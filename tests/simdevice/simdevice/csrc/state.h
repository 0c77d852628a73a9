// What the simulated device counts and refuses, and the C interface by which Python asks it.
//
// In: increments from device.cpp and graph.cpp. Out: plain integers, thread-safe. Knows nothing of tensors.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/DispatchKey.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace simdevice {

struct Counters {
  std::atomic<int64_t> allocated{0}, peak{0}, allocations{0};
  std::atomic<int64_t> limit{int64_t(1) << 62};
  std::atomic<int64_t> kernels{0}, loose_kernels{0}, scalar_reads{0}, shape_reads{0};
  std::atomic<int64_t> copies_to_host{0}, async_copies_to_host{0}, copies_to_device{0}, waited_copies_to_device{0};
  std::atomic<int64_t> recipes{0}, captures{0}, replays{0}, view_writes{0};
  std::mutex by_name_mutex;
  std::map<std::string, int64_t> by_name;
};

struct Device {
  c10::DeviceType type = c10::DeviceType::CPU;
  c10::DispatchKey key = c10::DispatchKey::Undefined;
  std::string name;
  bool promote = false;  // let elementwise operands of two floating dtypes through
  bool lazy = false;     // count recipes between marks
  bool strict = false;   // refuse a new recipe
  bool view_writes = true;  // a capture may hold a write through a view
};

inline Counters counters;
inline Device device;
// guarded regions and compiled programs belong to the thread that entered them
inline thread_local int64_t forbid_sync_depth = 0;
inline thread_local int64_t program_depth = 0;

// The tag in front tells Python which typed error to raise (errors.py).
[[noreturn]] inline void refuse(const char* tag, const std::string& what) {
  C10_THROW_ERROR(Error, std::string("[simdevice:") + tag + "] " + what);
}

bool capturing();
void complete_async_copies(int64_t up_to);
int64_t async_copy_clock();
void note_sync(std::atomic<int64_t>& counter, const std::string& what);
void flush_recipe(const char* why);

}  // namespace simdevice
