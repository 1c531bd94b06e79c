// The CUDA driver's functions, loaded at run time into a table that tests replace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>

namespace expertd::cuda {

// What is used of CUDA's driver, found at run time: builds and starts where there is no CUDA. Handles are void*.

using DevicePointer = uint64_t;

struct KernelNodeParams {  // CUDA_KERNEL_NODE_PARAMS_v2
  void* func;
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void** arguments;
  void** extra;
  void* kernel;
  void* context;
};

struct Copy2D {  // CUDA_MEMCPY2D_v2
  size_t from_x, from_y;
  int from_type;
  const void* from_host;
  DevicePointer from;
  void* from_array;
  size_t from_pitch;
  size_t to_x, to_y;
  int to_type;
  void* to_host;
  DevicePointer to;
  void* to_array;
  size_t to_pitch;
  size_t width, height;  // the first in bytes
};
inline constexpr int kUnifiedMemory = 4;  // of any device, or the host

inline constexpr int kCudaSuccess = 0, kCudaInvalidValue = 1, kCudaNotReady = 600, kCudaPeerAccessEnabled = 704;
// Of a device: whether its kernels find memory that was pinned after its allocation at the host's addresses.
inline constexpr int kHostAddressesOfRegistered = 91;

// Names and arguments, as cuda.h has them at `kDriverVersion`.
inline constexpr int kDriverVersion = 12040;
#define EXPERTD_DRIVER_CALLS(CALL)                                                                             \
  CALL(cuInit, (unsigned flags))                                                                               \
  CALL(cuDeviceGet, (int* device, int ordinal))                                                                \
  CALL(cuDeviceGetAttribute, (int* value, int attribute, int device))                                          \
  CALL(cuDevicePrimaryCtxRetain, (void** context, int device))                                                 \
  CALL(cuDevicePrimaryCtxRelease, (int device))                                                                \
  CALL(cuDeviceCanAccessPeer, (int* can, int device, int peer))                                                \
  CALL(cuCtxEnablePeerAccess, (void* peer, unsigned flags))                                                    \
  CALL(cuCtxSetCurrent, (void* context))                                                                       \
  CALL(cuGetErrorName, (int code, const char** name))                                                          \
  CALL(cuGetErrorString, (int code, const char** text))                                                        \
  CALL(cuMemAlloc, (DevicePointer * memory, size_t bytes))                                                     \
  CALL(cuMemFree, (DevicePointer memory))                                                                      \
  CALL(cuMemHostAlloc, (void** memory, size_t bytes, unsigned flags))                                          \
  CALL(cuMemFreeHost, (void* memory))                                                                          \
  CALL(cuMemcpyHtoDAsync, (DevicePointer to, const void* from, size_t bytes, void* stream))                    \
  CALL(cuMemcpyDtoHAsync, (void* to, DevicePointer from, size_t bytes, void* stream))                          \
  CALL(cuMemcpyDtoDAsync, (DevicePointer to, DevicePointer from, size_t bytes, void* stream))                  \
  CALL(cuMemcpy2DAsync, (const Copy2D* copy, void* stream))                                                    \
  CALL(cuStreamCreateWithPriority, (void** stream, unsigned flags, int priority))                              \
  CALL(cuStreamDestroy, (void* stream))                                                                        \
  CALL(cuStreamQuery, (void* stream))                                                                          \
  CALL(cuStreamWaitEvent, (void* stream, void* event, unsigned flags))                                         \
  CALL(cuStreamWriteValue32, (void* stream, DevicePointer to, uint32_t value, unsigned flags))                 \
  CALL(cuEventCreate, (void** event, unsigned flags))                                                          \
  CALL(cuEventDestroy, (void* event))                                                                          \
  CALL(cuEventRecord, (void* event, void* stream))                                                             \
  CALL(cuEventQuery, (void* event))                                                                            \
  CALL(cuEventElapsedTime, (float* milliseconds, void* begin, void* end))                                      \
  CALL(cuGraphClone, (void** clone, void* graph))                                                              \
  CALL(cuGraphDestroy, (void* graph))                                                                          \
  CALL(cuGraphGetNodes, (void* graph, void** nodes, size_t* count))                                            \
  CALL(cuGraphNodeGetType, (void* node, int* type))                                                            \
  CALL(cuGraphKernelNodeGetParams, (void* node, KernelNodeParams* params))                                     \
  CALL(cuGraphInstantiateWithFlags, (void** exec, void* graph, unsigned long long flags))                      \
  CALL(cuGraphExecDestroy, (void* exec))                                                                       \
  CALL(cuGraphExecKernelNodeSetParams, (void* exec, void* node, const KernelNodeParams* params))               \
  CALL(cuGraphUpload, (void* exec, void* stream))                                                              \
  CALL(cuGraphLaunch, (void* exec, void* stream))                                                              \
  CALL(cuLaunchKernel,                                                                                         \
       (void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, \
        unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void** extra))                \
  CALL(cuFuncGetParamInfo, (void* function, size_t index, size_t* offset, size_t* bytes))                      \
  CALL(cuKernelGetParamInfo, (void* kernel, size_t index, size_t* offset, size_t* bytes))

// What the device or its driver refused: "the device failed: CUDA_ERROR_X: text", of a call with its file and line.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The driver's functions; tests put others in their place.
struct Driver {
#define EXPERTD_DRIVER_MEMBER(name, arguments) int(*name) arguments = nullptr;
  EXPERTD_DRIVER_CALLS(EXPERTD_DRIVER_MEMBER)
#undef EXPERTD_DRIVER_MEMBER

  // Loads a driver, for the rest of the process's life. Throws `DeviceError`, also for one that is too old.
  static Driver load(const char* library = "libcuda.so.1");

  // "the device failed: CUDA_ERROR_X: text".
  std::string describe(int code) const;
  // Throws `DeviceError` unless `code` is success: what was refused, and which call of ours.
  void check(int code, std::source_location where = std::source_location::current()) const {
    if (code != kCudaSuccess) refuse(code, where);
  }

 private:
  [[noreturn]] void refuse(int code, std::source_location where) const;
};

// Owns one handle of the driver.
template <typename Value, int (*Driver::*Destroy)(Value)>
class Handle {
 public:
  Handle() = default;
  Handle(const Driver& driver, Value value) : driver_(&driver), value_(value) {}
  Handle(Handle&& other) noexcept : driver_(other.driver_), value_(std::exchange(other.value_, Value{})) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(driver_, other.driver_);
    std::swap(value_, other.value_);
    return *this;
  }
  ~Handle() {
    if (value_) (driver_->*Destroy)(value_);
  }

  Value get() const { return value_; }
  // Lets go of the handle: whoever uses it may not have ended.
  Value release() { return std::exchange(value_, Value{}); }

 private:
  const Driver* driver_ = nullptr;
  Value value_{};
};

using Stream = Handle<void*, &Driver::cuStreamDestroy>;
using Event = Handle<void*, &Driver::cuEventDestroy>;
using GraphHandle = Handle<void*, &Driver::cuGraphDestroy>;
using GraphExec = Handle<void*, &Driver::cuGraphExecDestroy>;
using DeviceMemory = Handle<DevicePointer, &Driver::cuMemFree>;
using PinnedMemory = Handle<void*, &Driver::cuMemFreeHost>;

// Lower numbers are more urgent; the driver takes the nearest that it has.
inline constexpr int kOrdinaryPriority = 0, kHighestPriority = -100;
Stream make_stream(const Driver& driver, int priority = kOrdinaryPriority);
Event make_event(const Driver& driver);
DeviceMemory make_device_memory(const Driver& driver, size_t bytes);
PinnedMemory make_pinned_memory(const Driver& driver, size_t bytes);

// A device's primary context, which it shares with torch.
class Context {
 public:
  // Retains the context and makes it the calling thread's.
  Context(const Driver& driver, int ordinal);
  ~Context() { driver_.cuDevicePrimaryCtxRelease(device_); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Makes it the calling thread's.
  void enter() const { driver_.check(driver_.cuCtxSetCurrent(context_)); }
  void* get() const { return context_; }
  // Whether kernels reach memory that was pinned after its allocation, at the host's addresses. What is allocated
  // pinned they always do.
  bool reaches_registered() const;
  int device() const { return device_; }

 private:
  const Driver& driver_;
  int device_ = 0;
  void* context_ = nullptr;
};

}  // namespace expertd::cuda
