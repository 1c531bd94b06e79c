#include "cuda/driver.h"

#include <dlfcn.h>

#include <string_view>

namespace expertd::cuda {

namespace {

constexpr unsigned kNonBlockingStream = 1;

// cuGetProcAddress_v2, which every driver since 12.0 exports.
using GetProcAddress = int (*)(const char* symbol, void** function, int version, uint64_t flags, int* status);

}  // namespace

Driver Driver::load(const char* library) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw DeviceError(std::string("no CUDA driver: ") + dlerror());
  auto find = reinterpret_cast<GetProcAddress>(dlsym(handle, "cuGetProcAddress_v2"));
  if (!find) throw DeviceError(std::string(library) + " is older than CUDA 12.0");
  Driver driver;
  auto fill = [&](const char* name, auto* member) {
    void* function = nullptr;
    int status = 0;
    if (find(name, &function, kDriverVersion, 0, &status) != kCudaSuccess || !function)
      throw DeviceError(std::string(library) + " has no " + name + ": it is older than CUDA 12.4");
    *member = reinterpret_cast<std::remove_pointer_t<decltype(member)>>(function);
  };
#define EXPERTD_DRIVER_FILL(name, arguments) fill(#name, &driver.name);
  EXPERTD_DRIVER_CALLS(EXPERTD_DRIVER_FILL)
#undef EXPERTD_DRIVER_FILL
  return driver;
}

std::string Driver::describe(int code) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName(code, &name) != kCudaSuccess || cuGetErrorString(code, &text) != kCudaSuccess)
    return "the device failed: CUDA error " + std::to_string(code);
  return std::string("the device failed: ") + name + ": " + text;
}

void Driver::refuse(int code, std::source_location where) const {
  const std::string_view file = where.file_name();
  throw DeviceError(describe(code) + " (" + std::string(file.substr(file.find_last_of('/') + 1)) + ":" +
                    std::to_string(where.line()) + ")");
}

Stream make_stream(const Driver& driver, int priority) {
  void* stream = nullptr;
  driver.check(driver.cuStreamCreateWithPriority(&stream, kNonBlockingStream, priority));
  return {driver, stream};
}

Event make_event(const Driver& driver) {
  void* event = nullptr;
  driver.check(driver.cuEventCreate(&event, 0));
  return {driver, event};
}

DeviceMemory make_device_memory(const Driver& driver, size_t bytes) {
  DevicePointer memory = 0;
  driver.check(driver.cuMemAlloc(&memory, bytes));
  return {driver, memory};
}

PinnedMemory make_pinned_memory(const Driver& driver, size_t bytes) {
  void* memory = nullptr;
  driver.check(driver.cuMemHostAlloc(&memory, bytes, 0));
  return {driver, memory};
}

Context::Context(const Driver& driver, int ordinal) : driver_(driver) {
  driver.check(driver.cuInit(0));
  driver.check(driver.cuDeviceGet(&device_, ordinal));
  driver.check(driver.cuDevicePrimaryCtxRetain(&context_, device_));
  if (int code = driver.cuCtxSetCurrent(context_); code != kCudaSuccess) {
    driver.cuDevicePrimaryCtxRelease(device_);
    driver.check(code);
  }
}

bool Context::reaches_registered() const {
  int reaches = 0;
  driver_.check(driver_.cuDeviceGetAttribute(&reaches, kHostAddressesOfRegistered, device_));
  return reaches != 0;
}

}  // namespace expertd::cuda
