// Lets a torch without CUDA make steps on fake CUDA tensors: it has one device, whose streams do nothing.
//
// To be loaded before torch (LD_PRELOAD), by fake_cuda_steps.py: two of torch's own functions are replaced.

#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
constexpr auto CUDA = c10::DeviceType::CUDA;

struct OneDevice final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(CUDA, 0)); }
  c10::Device exchangeDevice(c10::Device) const override { return {CUDA, 0}; }
  c10::Device getDevice() const override { return {CUDA, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
OneDevice device;
c10::impl::DeviceGuardImplRegistrar registered(CUDA, &device);

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
} // namespace

// Autograd asks these two which devices have streams, and whether one is in use.
std::optional<c10::DeviceType> at::accelerator::getAccelerator(bool) { return CUDA; }

const at::CUDAHooksInterface& at::detail::getCUDAHooks() {
  static const Hooks hooks;
  return hooks;
}
