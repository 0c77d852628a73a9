// The C interface that Python calls through ctypes. No exception crosses it: a failed call returns -1 and leaves
// its text in simdevice_error().
#include "kernels.h"

#include <torch/library.h>

namespace {
thread_local std::string last_error;

template <class Body>
int64_t guarded(const Body& body) {
  try {
    return body();
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  }
  return -1;
}
}  // namespace

extern "C" {
using namespace simdevice;

const char* simdevice_error() { return last_error.c_str(); }

int64_t simdevice_start(const char* type, const char* name) {
  return guarded([&]() -> int64_t {
    const std::string wanted = type;
    TORCH_CHECK(device.type == c10::DeviceType::CPU, "the simulated device is already ", device.name);
    start(wanted == "cuda" ? c10::DeviceType::CUDA : wanted == "hpu" ? c10::DeviceType::HPU : c10::DeviceType::PrivateUse1, name);
    return 0;
  });
}
void simdevice_options(bool promote, bool lazy, bool view_writes) {
  device.view_writes = view_writes;
  device.promote = promote;
  device.lazy = lazy;
}
void simdevice_set_strict(bool strict) { device.strict = strict; }
void simdevice_set_limit(int64_t bytes) { counters.limit = bytes; }
void simdevice_reset_peak() { counters.peak = counters.allocated.load(); }
void simdevice_forbid_sync(int64_t change) { forbid_sync_depth += change; }
void simdevice_in_program(int64_t change) { program_depth += change; }
void simdevice_synchronize() { complete_async_copies(async_copy_clock()); }
int64_t simdevice_flush_recipe() { return guarded([] { flush_recipe("mark_step"); return int64_t(0); }); }
int64_t simdevice_capture_begin() { return guarded([] { return begin_capture(); }); }
int64_t simdevice_capture_end(bool keep) { return guarded([&] { return end_capture(keep); }); }
int64_t simdevice_capturing() { return capturing() ? 1 : 0; }
// `pairs` holds 2 * num_pairs StorageImpl addresses: the captured storage and the one to use in its place
int64_t simdevice_replay(int64_t id, int64_t num_pairs, void** pairs) {
  return guarded([&] {
    StorageMap instead;
    for (int64_t i = 0; i < num_pairs; i++)
      instead[static_cast<c10::StorageImpl*>(pairs[2 * i])] = static_cast<c10::StorageImpl*>(pairs[2 * i + 1]);
    replay(id, instead);
    return int64_t(0);
  });
}
void simdevice_free_graph(int64_t id) { free_graph(id); }

// in the order of native.COUNTERS
void simdevice_counters(int64_t* out) {
  const std::atomic<int64_t>* all[] = {
      &counters.limit, &counters.allocated, &counters.peak, &counters.allocations, &counters.kernels,
      &counters.loose_kernels, &counters.scalar_reads, &counters.shape_reads, &counters.copies_to_host,
      &counters.async_copies_to_host, &counters.copies_to_device, &counters.waited_copies_to_device,
      &counters.recipes, &counters.captures, &counters.replays, &counters.view_writes};
  for (const auto* counter : all) *out++ = counter->load();
}
void simdevice_reset_counters() {
  std::atomic<int64_t>* all[] = {
      &counters.kernels, &counters.loose_kernels, &counters.scalar_reads, &counters.shape_reads,
      &counters.copies_to_host, &counters.async_copies_to_host, &counters.copies_to_device,
      &counters.waited_copies_to_device, &counters.recipes, &counters.captures, &counters.replays, &counters.view_writes};
  for (auto* counter : all) counter->store(0);
  std::lock_guard<std::mutex> lock(counters.by_name_mutex);
  counters.by_name.clear();
}
// "name count\n" for each kernel; the text lives until the next call in this thread
const char* simdevice_kernel_counts() {
  thread_local std::string text;
  text.clear();
  std::lock_guard<std::mutex> lock(counters.by_name_mutex);
  for (const auto& [name, count] : counters.by_name) text += name + " " + std::to_string(count) + "\n";
  return text.c_str();
}
}
