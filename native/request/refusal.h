// Why a request is not answered with sums.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace expertd {

// gRPC's status codes, as far as the contract uses them (proto/base/errors.py has an exception for each).
enum class Code : int {
  kOk = 0,
  kCancelled = 1,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kNotFound = 5,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kAborted = 10,
  kInternal = 13,
  kUnavailable = 14,
};

// Why a request is not answered with sums. The text names the field and the bound.
struct Refusal {
  Code code;
  std::string text;
  std::optional<double> retry_after = std::nullopt;  // seconds
};

}  // namespace expertd
