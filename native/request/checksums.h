// What tells that a request was altered on its way.
#pragma once

#include <cstdint>
#include <optional>

#include "request/message.h"
#include "request/refusal.h"
#include "request/rules.h"

namespace expertd {

// CRC-32C of what decides the answer beside the tensors, in the contract's order; `tensors_checksum` is part of it.
uint32_t fields_checksum(const Message& message);

// CRC-32C of hidden states, scales, ids and weights, as far as they are not in a GPU's memory.
uint32_t tensors_checksum(const Tensors& tensors);

// Nothing, or that a checksum of the message is not the one of what came; one that it lacks is not missed.
std::optional<Refusal> check_fields(const Message& message);
std::optional<Refusal> check_bytes(const Message& message, const Tensors& tensors);

}  // namespace expertd
