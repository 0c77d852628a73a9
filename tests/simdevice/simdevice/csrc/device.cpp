// A torch device in host memory: allocator, guard, and a boxed fallback that runs the CPU kernel on the same bytes.
//
// In: `simdevice_start(type, name)` once, before the first tensor. Out: real at::Tensors of that device type.
// Every operator without a kernel of its own goes through `fallback`, which refuses mixed devices and mixed
// floating dtypes, keeps views and in-place writes, counts, and lets graph.cpp record. Knows no vendor.
#include "kernels.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

namespace simdevice {
namespace {

constexpr size_t kHeader = 64;  // one cache line before each block holds its size
constexpr int kPoison = 0xFF;   // NaN in every float type, -1 in signed integers

struct Allocator final : c10::Allocator {
  static void release(void* data) {
    if (data == nullptr) return;
    auto* block = static_cast<char*>(data) - kHeader;
    counters.allocated -= *reinterpret_cast<int64_t*>(block);
    std::free(block);
  }
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, c10::Device(device.type, 0)};
    const int64_t now = (counters.allocated += static_cast<int64_t>(bytes));
    if (now > counters.limit) {
      counters.allocated -= static_cast<int64_t>(bytes);
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, device.name, " out of memory: tried to allocate ", bytes,
          " bytes, ", now - static_cast<int64_t>(bytes), " of ", counters.limit.load(), " bytes are in use");
    }
    int64_t seen = counters.peak;
    while (now > seen && !counters.peak.compare_exchange_weak(seen, now)) {
    }
    counters.allocations++;
    void* block = nullptr;
    TORCH_CHECK(posix_memalign(&block, kHeader, bytes + kHeader) == 0, "the host has no ", bytes, " bytes left");
    *static_cast<int64_t*>(block) = static_cast<int64_t>(bytes);
    void* data = static_cast<char*>(block) + kHeader;
    std::memset(data, kPoison, bytes);
    return {data, data, &release, c10::Device(device.type, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;

thread_local int64_t current_stream = 0;
std::atomic<int64_t> next_stream{1};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream_of(int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(device.type, 0), id);
  }
  c10::DeviceType type() const override { return device.type; }
  c10::Device exchangeDevice(c10::Device) const override { return {device.type, 0}; }
  c10::Device getDevice() const override { return {device.type, 0}; }
  void setDevice(c10::Device d) const override {
    TORCH_CHECK(d.index() <= 0, device.name, ": invalid device ordinal ", int(d.index()), ", there is one device");
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream_of(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream_of(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream_of(next_stream++); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream_of(next_stream++); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    const auto old = current_stream;
    current_stream = s.id();
    return stream_of(old);
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  // an event is the number of asynchronous copies enqueued before it, plus one
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(async_copy_clock() + 1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void* event) const override {
    synchronizeEvent(event);
    return true;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) complete_async_copies(reinterpret_cast<int64_t>(event) - 1);
  }
  void synchronizeStream(const c10::Stream&) const override { complete_async_copies(async_copy_clock()); }
  void synchronizeDevice(const c10::DeviceIndex) const override { complete_async_copies(async_copy_clock()); }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
Guard guard;

c10::DispatchKeySet keys() { return c10::DispatchKeySet(device.key); }

void check_ordinal(std::optional<at::Device> d) {
  TORCH_CHECK(!d || d->index() <= 0, device.name, ": invalid device ordinal ", int(d->index()), ", there is one device");
}

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> where, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  check_ordinal(where);
  at::Tensor out = at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, keys(), c10::dtype_or_default(dtype), format);
  if (capturing()) record_fresh(out);
  return out;
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> where, std::optional<bool>) {
  check_ordinal(where);
  at::Tensor out = at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator, keys(), c10::dtype_or_default(dtype));
  if (capturing()) record_fresh(out);
  return out;
}

at::Tensor as_strided(
    const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? offset->guard_int(__FILE__, __LINE__) : self.storage_offset());
  mark_view(out);
  return out;
}

at::Tensor& set_storage_offset(
    at::Tensor& self, c10::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  const auto start = offset.guard_int(__FILE__, __LINE__);
  if (stride.size() == sizes.size()) {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride), start);
  } else {
    impl->set_sizes_contiguous(sizes);
    impl->set_storage_offset(start);
  }
  return self;
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage storage) {
  const auto num_items = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage_offset(self, std::move(storage), 0, c10::SymIntArrayRef({num_items}), {});
}

const at::Tensor& resize(
    const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  if (capturing()) refuse("not-capturable", "aten::resize_ inside a graph capture: captured addresses are fixed");
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Scalar local_scalar(const at::Tensor& self) {
  note_sync(counters.scalar_reads, "a scalar read (item(), int(), bool() or if) of a tensor");
  flush_recipe("item");
  complete_async_copies(async_copy_clock());
  return host_alias(self).item();
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  const bool to_host = on_device(self) && !on_device(dst);
  const bool to_device = !on_device(self) && on_device(dst);
  if (capturing()) {
    if (to_host || to_device) refuse("not-capturable", "a copy between host and device inside a graph capture");
    record_copy(self, dst);
  }
  if (to_device) {
    counters.copies_to_device++;
    // torch synchronizes the stream after it (ATen/native/cuda/Copy.cu, memcpy_and_sync)
    if (!non_blocking && device.name == "cuda")
      note_sync(counters.waited_copies_to_device, "a blocking copy to the device");
  }
  if (to_host) {
    flush_recipe("copy to the host");
    if (non_blocking) {
      counters.async_copies_to_host++;
      enqueue_async_copy(host_alias(self), dst);
      return dst;
    }
    note_sync(counters.copies_to_host, "a blocking copy to the host");
    complete_async_copies(async_copy_clock());
  }
  if (!to_host && !to_device) {
    note_kernel("aten::copy_");
    note_write("aten::copy_", dst);
    if (device.lazy && !capturing()) extend_recipe("copy " + c10::str(self.sizes(), dst.sizes(), dst.dtype()));
  }
  auto to = on_device(dst) ? host_alias(dst) : dst;
  to.copy_(on_device(self) ? host_alias(self) : self);
  return dst;
}

at::Tensor& copy_in_place(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  copy_from(src, self, non_blocking);
  return self;
}

// the math decomposition: every operation of attention is then seen, counted and captured
int64_t sdp_choice(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;
}

}  // namespace

bool on_device(const at::Tensor& t) { return t.defined() && t.device().type() == device.type; }

at::Tensor host_alias(const at::Tensor& t, const StorageMap* instead) {
  if (t.storage().nbytes() == 0 && t.numel() == 0) return at::empty(t.sizes(), t.options().device(c10::kCPU));
  auto* owner = new c10::Storage(t.storage());
  if (instead != nullptr) {
    const auto found = instead->find(t.storage().unsafeGetStorageImpl());
    if (found != instead->end()) *owner = c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(found->second));
  }
  auto data = c10::DataPtr(
      owner->mutable_data(), owner, [](void* s) { delete static_cast<c10::Storage*>(s); }, c10::Device(c10::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), std::move(data), nullptr, false);
  auto out = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_neg()) out._set_neg(true);
  if (t.is_conj()) out._set_conj(true);
  return out;
}

at::Tensor to_device(const at::Tensor& host) {
  const auto dtype = host.scalar_type();
  at::Tensor out = host.is_non_overlapping_and_dense()
      ? at::detail::empty_strided_generic(host.sizes(), host.strides(), &allocator, keys(), dtype)
      : at::detail::empty_generic(host.sizes(), &allocator, keys(), dtype, std::nullopt);
  host_alias(out).copy_(host);
  return out;
}

void poison(void* data, size_t bytes) {
  if (bytes > 0) std::memset(data, kPoison, bytes);
}

struct ViewMark final : c10::BackendMeta {
  c10::intrusive_ptr<c10::BackendMeta> clone(const c10::intrusive_ptr<c10::BackendMeta>& self) const override {
    return self;
  }
};

void mark_view(const at::Tensor& t) { t.unsafeGetTensorImpl()->set_backend_meta(c10::make_intrusive<ViewMark>()); }

void note_write(const std::string& name, const at::Tensor& t) {
  if (!on_device(t) || t.unsafeGetTensorImpl()->get_backend_meta() == nullptr) return;
  if (capturing() && !device.view_writes)
    refuse("not-capturable", name + " writes through a view inside a graph capture; write to the whole tensor");
  counters.view_writes++;
}

void note_sync(std::atomic<int64_t>& counter, const std::string& what) {
  if (capturing()) refuse("not-capturable", what + " inside a graph capture");
  if (forbid_sync_depth > 0) refuse("host-sync", what + " where the host must not wait for " + device.name);
  counter++;
}

// collectives on device memory go to the CPU backend of the group, as every other operator
void register_collectives() {
  struct Quiet final : c10::WarningHandler {  // PrivateUse1 and CUDA have kernels already: they are replaced
    void process(const c10::Warning&) override {}
  } quiet;
  c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  static torch::Library c10d(torch::Library::IMPL, "c10d", device.key, __FILE__, __LINE__);
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.name.rfind("c10d::", 0) == 0)
      c10d.impl(name.name.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

void start(c10::DeviceType type, const std::string& name) {
  device.type = type;
  device.name = name;
  device.key = type == c10::DeviceType::CUDA ? c10::DispatchKey::CUDA
      : type == c10::DeviceType::HPU         ? c10::DispatchKey::HPU
                                             : c10::DispatchKey::PrivateUse1;
  c10::SetAllocator(type, &allocator);
  static c10::impl::DeviceGuardImplRegistrar guard_registrar(type, &guard);
  register_hooks();
  // libraries live as long as the process: operators stay registered
  static torch::Library every(torch::Library::IMPL, "_", device.key, __FILE__, __LINE__);
  every.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
  static torch::Library aten(torch::Library::IMPL, "aten", device.key, __FILE__, __LINE__);
  aten.impl("empty.memory_format", &empty);
  aten.impl("empty_strided", &empty_strided);
  aten.impl("as_strided", &as_strided);
  aten.impl("resize_", &resize);
  aten.impl("set_.source_Storage", &set_storage);
  aten.impl("set_.source_Storage_storage_offset", &set_storage_offset);
  aten.impl("_copy_from", &copy_from);
  if (type == c10::DeviceType::CUDA) aten.impl("copy_", &copy_in_place);
  aten.impl("_local_scalar_dense", &local_scalar);
  aten.impl("_fused_sdp_choice", &sdp_choice);
  register_collectives();
}

}  // namespace simdevice
