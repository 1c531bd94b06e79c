// What the server refused.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

// "INVALID_ARGUMENT: top_k is 9; it must be from 1 to 8".
class Refused : public std::runtime_error {
 public:
  Refused(unsigned code, const std::string& message) : std::runtime_error(Name(code) + ": " + message) {}

 private:
  static std::string Name(unsigned code) {
    static constexpr std::array kNames = {
        "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
        "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
        "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
        "DATA_LOSS", "UNAUTHENTICATED"};
    return code < kNames.size() ? kNames[code] : "status " + std::to_string(code);
  }
};
