// Compiles only if what the driver's table says agrees with cuda.h.
#include <cuda.h>

#include <type_traits>

#include "cuda/driver.h"

template <typename Ours, typename Theirs>
constexpr bool same =
    sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> &&
    std::is_floating_point_v<std::remove_pointer_t<Ours>> == std::is_floating_point_v<std::remove_pointer_t<Theirs>>;

template <typename Ours, typename Theirs>
constexpr bool same_call = false;
template <typename... Ours, typename... Theirs>
  requires(sizeof...(Ours) == sizeof...(Theirs))
constexpr bool same_call<int (*)(Ours...), CUresult (*)(Theirs...)> = (same<Ours, Theirs> && ...);

#define AGREES(name, arguments) \
  static_assert(same_call<decltype(expertd::cuda::Driver::name), decltype(&::name)>, #name);
EXPERTD_DRIVER_CALLS(AGREES)

using Ours = expertd::cuda::KernelNodeParams;
using Theirs = CUDA_KERNEL_NODE_PARAMS;
static_assert(sizeof(Ours) == sizeof(Theirs));
static_assert(offsetof(Ours, grid_x) == offsetof(Theirs, gridDimX));
static_assert(offsetof(Ours, shared_bytes) == offsetof(Theirs, sharedMemBytes));
static_assert(offsetof(Ours, arguments) == offsetof(Theirs, kernelParams));
static_assert(offsetof(Ours, extra) == offsetof(Theirs, extra));
static_assert(offsetof(Ours, kernel) == offsetof(Theirs, kern));
static_assert(offsetof(Ours, context) == offsetof(Theirs, ctx));
static_assert(expertd::cuda::kCudaNotReady == CUDA_ERROR_NOT_READY &&
              expertd::cuda::kCudaInvalidValue == CUDA_ERROR_INVALID_VALUE);
static_assert(expertd::cuda::kHostAddressesOfRegistered == CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM);
static_assert(expertd::cuda::kDriverVersion <= CUDA_VERSION);
