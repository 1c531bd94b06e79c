#include "request/rules.h"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <string>

#include "request/checksums.h"

namespace expertd {
namespace {

constexpr size_t kMostQuoted = 64;

template <typename... Parts>
Refusal refuse(Code code, const Parts&... parts) {
  std::string text;
  const auto add = [&text](const auto& part) {
    if constexpr (std::is_convertible_v<decltype(part), std::string_view>) {
      text += part;
    } else {
      text += std::to_string(part);
    }
  };
  (add(parts), ...);
  return Refusal{code, std::move(text)};
}

std::string name_of(uint64_t code) {
  switch (code) {
    case 0:
      return "DTYPE_UNSPECIFIED";
    case 1:
      return "DTYPE_FLOAT8_E4M3FN";
    case 2:
      return "DTYPE_BFLOAT16";
    case 3:
      return "DTYPE_FLOAT32";
    case 4:
      return "DTYPE_FLOAT4_E2M1FN_X2";
    default:
      return std::to_string(code);
  }
}

std::string_view torch_name(Dtype dtype) {
  return dtype == Dtype::kFloat8E4M3FN ? "float8_e4m3fn" : dtype == Dtype::kBFloat16 ? "bfloat16" : "float32";
}

std::optional<Refusal> check_range(std::string_view field, uint64_t value, uint64_t high) {
  if (value >= 1 && value <= high) return std::nullopt;
  return refuse(Code::kInvalidArgument, field, " is ", value, "; it must be from 1 to ", high);
}

std::optional<Refusal> check_dtype(std::string_view field, uint64_t code, std::initializer_list<Dtype> accepted) {
  std::string choices;
  for (const Dtype dtype : accepted) {
    if (static_cast<uint64_t>(dtype) == code) return std::nullopt;
    choices += (choices.empty() ? "" : ", ") + name_of(static_cast<uint64_t>(dtype));
  }
  return refuse(Code::kInvalidArgument, field, " is ", name_of(code), "; accepted: ", choices);
}

std::optional<Refusal> check_length(std::string_view field, std::string_view bytes, uint64_t rows, uint64_t columns,
                                    std::string_view dtype, size_t width) {
  const uint64_t expected = rows * columns * width;
  if (bytes.size() == expected) return std::nullopt;
  return refuse(Code::kInvalidArgument, field, " has ", bytes.size(), " bytes; [", rows, ", ", columns, "] ", dtype,
                " takes ", expected);
}

std::string at(size_t index, size_t columns) {
  return "[" + std::to_string(index / columns) + ", " + std::to_string(index % columns) + "]";
}

// `values` are floats at any address: they are looked at as their bits.
std::optional<Refusal> check_finite(std::string_view field, std::string_view values, size_t columns) {
  constexpr uint32_t kExponent = 0x7F800000u;
  const auto bits_of = [&](size_t index) {
    uint32_t bits;
    std::memcpy(&bits, values.data() + 4 * index, sizeof bits);
    return bits;
  };
  const size_t count = values.size() / 4;
  uint32_t wrong = 0;
  for (size_t i = 0; i < count; ++i) wrong |= (bits_of(i) & kExponent) == kExponent;
  if (!wrong) return std::nullopt;
  size_t first = 0;
  while ((bits_of(first) & kExponent) != kExponent) ++first;
  const uint32_t bits = bits_of(first);
  const char* value = (bits & 0x7FFFFFu) ? "nan" : (bits >> 31) ? "-inf" : "inf";
  return refuse(Code::kInvalidArgument, field, at(first, columns), " is ", value, "; it must be finite");
}

bool repeats(const int32_t* row, uint32_t top_k) {
  for (uint32_t i = 1; i < top_k; ++i) {
    for (uint32_t j = 0; j < i; ++j) {
      if (row[i] == row[j] && row[i] >= 0) return true;
    }
  }
  return false;
}

std::string list_of(const int32_t* row, uint32_t top_k) {
  std::string text = "[";
  for (uint32_t i = 0; i < top_k; ++i) text += (i ? ", " : "") + std::to_string(row[i]);
  return text + "]";
}

// Global ids become local ones in place; the receipt is counted on the way.
std::optional<Refusal> localise(Admitted* request) {
  std::vector<int32_t>& ids = request->local_ids;
  const OwnedLayer& owned = *request->owned;
  const auto count = static_cast<int64_t>(owned.local_ids.size());
  const auto outside = std::find_if(ids.begin(), ids.end(), [=](int32_t id) { return id < -1 || id >= count; });
  if (outside != ids.end()) {
    return refuse(Code::kInvalidArgument, "expert_ids", at(outside - ids.begin(), request->top_k), " is ", *outside,
                  "; it must be -1 or from 0 to ", count - 1);
  }
  const auto foreign =
      std::find_if(ids.begin(), ids.end(), [&](int32_t id) { return id >= 0 && owned.local_ids[id] < 0; });
  if (foreign != ids.end()) {
    return refuse(Code::kNotFound, "expert_ids", at(foreign - ids.begin(), request->top_k), " is ", *foreign,
                  "; this server owns experts ", owned.experts_text, " of layer ", owned.layer);
  }
  for (uint32_t token = 0; token < request->tokens; ++token) {
    const int32_t* row = ids.data() + size_t{token} * request->top_k;
    if (repeats(row, request->top_k)) {
      return refuse(Code::kInvalidArgument, "expert_ids[", token, "] is ", list_of(row, request->top_k),
                    "; a token may name an expert at most once");
    }
  }
  request->pairs.assign(owned.experts.size(), 0);
  for (int32_t& id : ids) {
    if (id < 0) continue;
    id = owned.local_ids[id];
    ++request->pairs[id];
  }
  return std::nullopt;
}

}  // namespace

std::string quoted(std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string out = "'";
  for (const char c : text.substr(0, kMostQuoted)) {
    const auto byte = static_cast<uint8_t>(c);
    if (byte >= 0x20 && byte < 0x7F && c != '\'' && c != '\\') {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  out += "'";
  if (text.size() > kMostQuoted) out += "... of " + std::to_string(text.size()) + " bytes";
  return out;
}

std::variant<Admitted, Refusal> check_sizes(const Message& message, PlacementPtr placement) {
  if (message.cancels) {
    return refuse(Code::kInvalidArgument, "cancels is ", *message.cancels,
                  "; it is for requests of a stream: end this call instead");
  }
  if (auto refusal = check_fields(message)) return *refusal;
  if (auto refusal = check_range("num_tokens", message.num_tokens, placement->max_tokens)) return *refusal;
  if (auto refusal = check_range("top_k", message.top_k, placement->max_top_k)) return *refusal;
  if (auto refusal = check_dtype("hidden_dtype", message.hidden_dtype, {Dtype::kFloat8E4M3FN, Dtype::kBFloat16})) {
    return *refusal;
  }
  if (auto refusal =
          check_dtype("reply_dtype", message.reply_dtype, {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat8E4M3FN})) {
    return *refusal;
  }
  Admitted request;
  request.placement = std::move(placement);
  request.request_id = message.request_id;
  request.tokens = static_cast<uint32_t>(message.num_tokens);
  request.top_k = static_cast<uint32_t>(message.top_k);
  request.hidden_dtype = static_cast<Dtype>(message.hidden_dtype);
  request.reply_dtype = static_cast<Dtype>(message.reply_dtype);
  request.timeout_us = message.timeout_us;
  request.checked = message.tensors_checksum.has_value();
  return request;
}

std::optional<Refusal> check_tensors(const Message& message, const Tensors& tensors, Admitted* request) {
  if (auto refusal = check_bytes(message, tensors)) return refusal;
  const Placement& placement = *request->placement;
  const uint64_t tokens = request->tokens, top_k = request->top_k, width = placement.hidden_size;
  const bool quantized = request->hidden_dtype == Dtype::kFloat8E4M3FN;
  const uint64_t blocks = width / QUANTIZATION_BLOCK;
  if (auto refusal = check_length("hidden_scales", tensors.scales, quantized ? tokens : 0, blocks, "float32", 4)) {
    return refusal;
  }
  if (auto refusal = check_length("hidden", tensors.hidden, tokens, width, torch_name(request->hidden_dtype),
                                  size_of(request->hidden_dtype))) {
    return refusal;
  }
  if (auto refusal = check_length("expert_ids", tensors.ids, tokens, top_k, "int32", 4)) return refusal;
  if (auto refusal = check_length("weights", tensors.weights, tokens, top_k, "float32", 4)) return refusal;
  if (message.model_fingerprint != placement.model_fingerprint) {
    return refuse(Code::kFailedPrecondition, "model_fingerprint is ", quoted(message.model_fingerprint),
                  "; this server holds ", quoted(placement.model_fingerprint));
  }
  if (message.placement_epoch && *message.placement_epoch != placement.epoch) {
    return refuse(Code::kAborted, "placement_epoch is ", *message.placement_epoch, "; the current one is ",
                  placement.epoch);
  }
  request->owned = placement.find(message.layer);
  if (request->owned == nullptr) {
    return refuse(Code::kNotFound, "layer is ", message.layer, "; this server owns layers ", placement.layers_text);
  }
  request->layer = static_cast<uint32_t>(message.layer);
  if (auto refusal = check_finite("weights", tensors.weights, top_k)) return refusal;
  // Those on a GPU cannot be looked at here; the contract does not ask for it there.
  if (!tensors.on_device) {
    if (auto refusal = check_finite("hidden_scales", tensors.scales, blocks)) return refusal;
  }
  request->local_ids.resize(tokens * top_k);
  std::memcpy(request->local_ids.data(), tensors.ids.data(), tensors.ids.size());
  request->hidden = tensors.hidden;
  request->scales = tensors.scales;
  request->weights = tensors.weights;
  return localise(request);
}

}  // namespace expertd
