// What torch asks of an accelerator beside its kernels: generators, pinned memory, "is it there".
//
// A generator of the device draws from a CPU generator of its own; fallback.cpp passes that one to the CPU kernel.
#include "kernels.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/HPUHooksInterface.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>

#include <cstdlib>

namespace simdevice {
namespace {

struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator inner;
  explicit DeviceGenerator(at::Generator from)
      : c10::GeneratorImpl({simdevice::device.type, 0}, c10::DispatchKeySet(simdevice::device.key)), inner(std::move(from)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  c10::GeneratorImpl* clone_impl() const override { return new DeviceGenerator(inner.clone()); }
};

const at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator());
  return generator;
}

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;

struct PinnedAllocator final : c10::Allocator {
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned.erase(static_cast<const char*>(data));
    }
    std::free(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 64, bytes + 64) == 0, "the host has no ", bytes, " bytes left");
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<const char*>(data)] = bytes;
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
PinnedAllocator pinned_allocator;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto next = pinned.upper_bound(static_cast<const char*>(data));
  if (next == pinned.begin()) return false;
  --next;
  return static_cast<const char*>(data) < next->first + std::max<size_t>(next->second, 1);
}

template <class Base>
struct Hooks : Base {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return c10::Device(device.type, 0); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex = -1) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex = -1) const override {
    return at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator());
  }
};
struct HpuHooks final : Hooks<at::HPUHooksInterface> {
  bool hasHPU() const override { return true; }
};
struct CudaHooks final : Hooks<at::CUDAHooksInterface> {
  bool hasCUDA() const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
};
using PrivateHooks = Hooks<at::PrivateUse1HooksInterface>;

}  // namespace

at::Generator host_generator(const at::Generator& generator) {
  auto* mine = dynamic_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl());
  return mine == nullptr ? generator : mine->inner;
}

// torch keeps the hooks object it made first, which may be the one that says "not built": it is then made anew in place
template <class Mine, class Base>
void take_over(const Base& kept) {
  static_assert(sizeof(Mine) == sizeof(Base));
  if (dynamic_cast<const Mine*>(&kept) == nullptr) new (const_cast<Base*>(&kept)) Mine();
}

void register_hooks() {
  if (device.type == c10::DeviceType::HPU) {
    at::HPUHooksRegistry()->Register("HPUHooks", [](at::HPUHooksArgs) { return std::make_unique<HpuHooks>(); });
    take_over<HpuHooks>(at::detail::getHPUHooks());
  } else if (device.type == c10::DeviceType::CUDA) {
    at::CUDAHooksRegistry()->Register("CUDAHooks", [](at::CUDAHooksArgs) { return std::make_unique<CudaHooks>(); });
    take_over<CudaHooks>(at::detail::getCUDAHooks());
  } else {
    static PrivateHooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
  }
}

}  // namespace simdevice
