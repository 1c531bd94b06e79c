// Torch's tensors in host memory, which are asked for what they are: nothing here is linked with torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "tokens/rows.h"

namespace expertd {

enum class Element : uint8_t { kBFloat16, kFloat16, kFloat32, kFloat8, kInt32, kInt64, kOther };

// [rows, columns], elements of a row side by side; whoever handed it over keeps it alive.
struct Tensor {
  std::byte* data;
  std::ptrdiff_t stride;  // bytes from one row to the next
  size_t rows, columns;
  Element element;

  WritableRows writable() const { return {data, stride}; }
  Rows matrix() const { return {data, stride}; }
  template <typename Value>
  const Value* values() const {
    return reinterpret_cast<const Value*>(data);
  }
};

inline constexpr size_t kAny = SIZE_MAX;

// What a tensor must be.
struct Wanted {
  Element element;
  std::optional<Element> other{};  // or this
  size_t rows = kAny, columns = kAny;
  bool packed = true;  // one row after another
};

// Throws `ValueError`, which names the tensor, unless it is a matrix of whole rows on the CPU.
Tensor tensor_of(pybind11::handle tensor, std::string_view name);
// The same where it is not what is wanted.
Tensor tensor_of(pybind11::handle tensor, std::string_view name, const Wanted& wanted);
// That of a dtype.
Element element_of(pybind11::handle dtype);

}  // namespace expertd
