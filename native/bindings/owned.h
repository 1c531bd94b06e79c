// Calls on what a parent process owns raise in its children.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <type_traits>

#include "base/owned.h"

namespace pybind11::detail {

// Every argument of such a type, `self` among them. Not those by std::shared_ptr.
template <typename T>
class type_caster<T, enable_if_t<std::is_base_of_v<expertd::Owned, T>>> : public type_caster_base<T> {
 public:
  bool load(handle source, bool convert) {
    if (!type_caster_base<T>::load(source, convert)) return false;
    const auto* owned = static_cast<const T*>(this->value);
    if (owned && !owned->here()) throw std::runtime_error("it belongs to the parent process");
    return true;
  }
};

}  // namespace pybind11::detail
