// What the rooms of the device share: aliases of device memory, the recorder, the fallback.
#pragma once

#include "state.h"

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <unordered_map>

namespace simdevice {

using StorageMap = std::unordered_map<c10::StorageImpl*, c10::StorageImpl*>;

bool on_device(const at::Tensor& t);
// the same bytes as a CPU tensor; with `instead`, those of the storage it names for this one
at::Tensor host_alias(const at::Tensor& t, const StorageMap* instead = nullptr);
at::Tensor to_device(const at::Tensor& host);     // a copy, counted as device memory
void poison(void* data, size_t bytes);            // as fresh memory
bool is_view(const c10::OperatorHandle& op);      // makes a view and runs nothing
void note_kernel(const std::string& name);        // counts one kernel

at::Generator host_generator(const at::Generator& generator);  // the CPU generator behind a device's
void register_hooks();
void start(c10::DeviceType type, const std::string& name);
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// `stack` in: device arguments, out: results. With `aliases` the results stay CPU tensors.
void run_on_host(
    const c10::OperatorHandle& op, torch::jit::Stack& stack,
    std::vector<std::pair<at::Tensor, at::Tensor>>* aliases, const StorageMap* instead = nullptr);
void mark_view(const at::Tensor& t);
void note_write(const std::string& name, const at::Tensor& t);  // a kernel writes `t` in place
void extend_recipe(const std::string& call);

int64_t begin_capture();
int64_t end_capture(bool keep);  // number of recorded calls
void replay(int64_t id, const StorageMap& instead);
void free_graph(int64_t id);
void record_fresh(const at::Tensor& t);
void record_copy(const at::Tensor& from, const at::Tensor& to);
void record_call(const c10::OperatorHandle& op, torch::jit::Stack args, torch::jit::Stack outs);
void enqueue_async_copy(const at::Tensor& from, const at::Tensor& to);

}  // namespace simdevice
