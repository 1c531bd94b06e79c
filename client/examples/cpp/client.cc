// An expertd client written from expert_shard.proto alone; it takes and gives the same files as the one in Node.js.

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "expert_shard.grpc.pb.h"
#include "lane.h"
#include "refused.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tensors travel little-endian; this machine is not"
#endif

namespace {

namespace v1 = expertd::v1;
using google::protobuf::Struct;
using google::protobuf::Value;

constexpr int kBlock = 128;
constexpr int kMessagesInFlight = 4;
constexpr uint64_t kLaneBytes = 64 << 20;
constexpr auto kTimeout = std::chrono::seconds(60);

// --- Numbers as the contract wants them ------------------------------------------------------------------------------

template <typename To, typename From>
To BitCast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// One float8_e4m3fn, rounded to nearest even; |value| must not exceed 448.
//
// Between two powers of two the code counts steps of an eighth of the lower one, and it goes on counting across powers
// of two, so a value that is rounded up to the next one needs no special case. Below 2^-6 the steps stay what they are.
uint8_t ToFloat8(float value) {
  const float magnitude = std::fabs(value);
  const int exponent = magnitude == 0 ? -6 : std::max(-6, std::ilogb(magnitude));
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));
  return static_cast<uint8_t>((std::signbit(value) ? 0x80 : 0) | (steps + 8 * (exponent + 6)));
}

// The upper half of a float32, rounded to nearest even.
uint16_t ToBfloat16(float value) {
  const auto bits = BitCast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Numbers as the `bytes` of a message, and back.
template <typename T>
std::string ToBytes(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

std::vector<float> ToFloats(const std::string& bytes) {
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

// Appends the FP8 bytes and the scale of each block of 128 values.
void Quantize(const std::vector<float>& hidden, std::vector<uint8_t>& stored, std::vector<float>& scales) {
  for (size_t first = 0; first < hidden.size(); first += kBlock) {
    const size_t last = std::min(first + kBlock, hidden.size());
    float largest = 1e-10f;
    for (size_t i = first; i < last; i++) largest = std::max(largest, std::fabs(hidden[i]));
    scales.push_back(largest / 448);
    for (size_t i = first; i < last; i++) stored.push_back(ToFloat8(hidden[i] / scales.back()));
  }
}

// --- One batch -------------------------------------------------------------------------------------------------------

struct Token {
  std::vector<float> hidden;
  std::vector<int32_t> ids;
  std::vector<float> weights;
};

using Tokens = std::vector<Token>;
using Requests = std::vector<v1::ExecuteRequest>;
using Replies = std::vector<v1::ExecuteResponse>;

v1::ExecuteRequest MakeRequest(const v1::GetShardResponse& shard, uint32_t layer, const Tokens& tokens,
                               v1::DType hidden_dtype, uint64_t request_id) {
  std::vector<uint8_t> float8;
  std::vector<uint16_t> bfloat16;
  std::vector<float> scales, weights;
  std::vector<int32_t> ids;
  for (const Token& token : tokens) {
    if (hidden_dtype == v1::DTYPE_FLOAT8_E4M3FN) {
      Quantize(token.hidden, float8, scales);
    } else {
      std::transform(token.hidden.begin(), token.hidden.end(), std::back_inserter(bfloat16), ToBfloat16);
    }
    ids.insert(ids.end(), token.ids.begin(), token.ids.end());
    weights.insert(weights.end(), token.weights.begin(), token.weights.end());
  }
  v1::ExecuteRequest request;
  request.set_request_id(request_id);
  request.set_model_fingerprint(shard.model_fingerprint());
  request.set_placement_epoch(shard.placement_epoch());
  request.set_layer(layer);
  request.set_num_tokens(tokens.size());
  request.set_top_k(tokens.front().ids.size());
  request.set_hidden_dtype(hidden_dtype);
  request.set_reply_dtype(v1::DTYPE_FLOAT32);
  request.set_hidden(hidden_dtype == v1::DTYPE_FLOAT8_E4M3FN ? ToBytes(float8) : ToBytes(bfloat16));
  request.set_hidden_scales(ToBytes(scales));
  request.set_expert_ids(ToBytes(ids));
  request.set_weights(ToBytes(weights));
  return request;
}

// --- The service -----------------------------------------------------------------------------------------------------

void Check(const grpc::Status& status) {
  if (!status.ok()) throw Refused(status.error_code(), status.error_message());
}

void Check(const Replies& replies) {
  for (const auto& reply : replies) {
    if (reply.has_error()) throw Refused(reply.error().code(), reply.error().message());
  }
}

// An expertd server.
class Server {
 public:
  explicit Server(const std::string& address) {
    grpc::ChannelArguments arguments;
    // The server bounds its messages (Limits.max_message_bytes); 4 MiB, the library's own bound, is too low.
    arguments.SetMaxReceiveMessageSize(-1);
    stub_ = v1::ExpertShard::NewStub(grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
  }

  v1::GetShardResponse GetShard() {
    const auto context = MakeContext();
    v1::GetShardResponse shard;
    Check(stub_->GetShard(context.get(), {}, &shard));
    return shard;
  }

  v1::ExecuteResponse Execute(const v1::ExecuteRequest& request) {
    const auto context = MakeContext();
    v1::ExecuteResponse reply;
    Check(stub_->Execute(context.get(), request, &reply));
    return reply;
  }

  // All requests in flight on one stream; replies come in any order and find their request by its id.
  Replies ExecuteStream(const Requests& requests) {
    const auto context = MakeContext();
    const auto stream = stub_->ExecuteStream(context.get());
    std::thread writer([&] {
      for (const auto& request : requests) {
        if (!stream->Write(request)) return;
      }
      stream->WritesDone();
    });
    std::map<uint64_t, v1::ExecuteResponse> answered;
    for (v1::ExecuteResponse reply; stream->Read(&reply);) answered[reply.request_id()] = reply;
    writer.join();
    Check(stream->Finish());
    Replies replies;
    for (const auto& request : requests) replies.push_back(answered.at(request.request_id()));
    return replies;
  }

  v1::RegisterSharedMemoryResponse RegisterSharedMemory() {
    const auto context = MakeContext();
    v1::RegisterSharedMemoryResponse door;
    Check(stub_->RegisterSharedMemory(context.get(), {}, &door));
    return door;
  }

 private:
  static std::unique_ptr<grpc::ClientContext> MakeContext() {
    auto context = std::make_unique<grpc::ClientContext>();
    context->set_deadline(std::chrono::system_clock::now() + kTimeout);
    return context;
  }

  std::unique_ptr<v1::ExpertShard::Stub> stub_;
};

// --- Results as JSON -------------------------------------------------------------------------------------------------

Value Number(double number) {
  Value value;
  value.set_number_value(number);
  return value;
}

Value Text(const std::string& text) {
  Value value;
  value.set_string_value(text);
  return value;
}

template <typename Items>
Value List(const Items& items) {
  Value value;
  value.mutable_list_value();
  for (const auto& item : items) *value.mutable_list_value()->add_values() = Number(static_cast<double>(item));
  return value;
}

std::string Base64(const std::string& bytes) {
  static constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t count = std::min<size_t>(3, bytes.size() - i);
    uint32_t group = 0;
    for (size_t j = 0; j < 3; j++) group = group << 8 | (j < count ? static_cast<uint8_t>(bytes[i + j]) : 0);
    for (size_t j = 0; j < 4; j++) text += j <= count ? kDigits[group >> (18 - 6 * j) & 63] : '=';
  }
  return text;
}

// What was sent and what came back, in the order of the requests.
Struct Collect(const Requests& requests, const Replies& replies, size_t width) {
  Struct result;
  auto& fields = *result.mutable_fields();
  std::vector<uint64_t> request_ids;
  std::string hidden, scales;
  for (const auto& request : requests) {
    hidden += request.hidden();
    scales += request.hidden_scales();
  }
  Value partials, receipt;
  partials.mutable_list_value();
  auto& pairs = *receipt.mutable_struct_value()->mutable_fields();
  for (const auto& reply : replies) {
    request_ids.push_back(reply.request_id());
    const std::vector<float> values = ToFloats(reply.partials());
    for (auto row = values.begin(); row != values.end(); row += width) {
      *partials.mutable_list_value()->add_values() = List(std::vector<float>(row, row + width));
    }
    for (int i = 0; i < reply.receipt_experts_size(); i++) {
      Value& count = pairs[std::to_string(reply.receipt_experts(i))];
      count.set_number_value(count.number_value() + reply.receipt_pairs(i));
    }
  }
  fields["request_ids"] = List(request_ids);
  fields["hidden"] = Text(Base64(hidden));
  fields["scales"] = List(ToFloats(scales));
  fields["partials"] = partials;
  fields["receipt"] = receipt;
  return result;
}

std::string ToJson(const google::protobuf::Message& message) {
  std::string json;
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  if (!status.ok()) throw std::runtime_error(status.ToString());
  return json;
}

// --- The program -----------------------------------------------------------------------------------------------------

struct Input {
  uint32_t layer = 0;
  Tokens tokens;
};

template <typename T>
std::vector<T> Row(const Value& list) {
  std::vector<T> row;
  for (const Value& value : list.list_value().values()) row.push_back(static_cast<T>(value.number_value()));
  return row;
}

// Tokens of the input file: { layer, hidden: [T][H], ids: [T][k], weights: [T][k] }.
Input ReadInput(const std::string& file) {
  std::ifstream stream(file);
  const std::string json((std::istreambuf_iterator<char>(stream)), {});
  Struct content;
  const auto status = google::protobuf::util::JsonStringToMessage(json, &content);
  if (!stream || !status.ok()) throw std::runtime_error(file + " cannot be read as JSON: " + status.ToString());
  const auto& fields = content.fields();
  Input input;
  input.layer = static_cast<uint32_t>(fields.at("layer").number_value());
  for (int token = 0; token < fields.at("hidden").list_value().values_size(); token++) {
    const auto row = [&](const char* name) { return fields.at(name).list_value().values(token); };
    input.tokens.push_back({Row<float>(row("hidden")), Row<int32_t>(row("ids")), Row<float>(row("weights"))});
  }
  return input;
}

// Five tokens of noise for this server's first experts.
Input RandomInput(const v1::GetShardResponse& shard) {
  std::mt19937 random(std::random_device{}());
  std::uniform_real_distribution<float> noise(-1, 1);
  const int experts = std::min<int>(shard.config().num_experts_per_tok(), shard.experts_size());
  Token token;
  token.hidden.resize(shard.config().hidden_size());
  token.ids.assign(shard.experts().begin(), shard.experts().begin() + experts);
  token.weights.assign(experts, 1.0f / experts);
  Input input{shard.layers(0), Tokens(5, token)};
  for (Token& each : input.tokens) {
    for (float& value : each.hidden) value = noise(random);
  }
  return input;
}

// Memory shared with a server of this machine that speaks the same version of the lane; null for all others.
std::unique_ptr<Lane> OpenLane(Server& server, const v1::GetShardResponse& shard) {
  try {
    const auto door = server.RegisterSharedMemory();
    if (door.lane_version() == kLaneVersion) return std::make_unique<Lane>(door, shard, kLaneBytes);
    std::cout << "no shared memory: the server's lane has version " << door.lane_version() << "\n";
  } catch (const Refused& error) {
    std::cout << "no shared memory: " << error.what() << "\n";
  }
  return nullptr;
}

// All tokens in one unary call, or cut into several requests of one stream or of a lane.
Struct RunOne(Server& server, Lane* lane, const v1::GetShardResponse& shard, const Input& input, const std::string& rpc,
              v1::DType hidden_dtype) {
  const size_t parts = rpc == "Execute" ? 1 : kMessagesInFlight;
  const size_t size = (input.tokens.size() + parts - 1) / parts;
  Requests requests;
  for (size_t first = 0; first < input.tokens.size(); first += size) {
    const auto begin = input.tokens.begin() + first;
    const Tokens part(begin, begin + std::min(size, input.tokens.size() - first));
    requests.push_back(MakeRequest(shard, input.layer, part, hidden_dtype, requests.size() + 1));
  }
  const Replies replies = rpc == "Execute"         ? Replies{server.Execute(requests.front())}
                          : rpc == "ExecuteStream" ? server.ExecuteStream(requests)
                                                   : lane->Execute(requests);
  Check(replies);
  return Collect(requests, replies, shard.config().hidden_size());
}

std::string Summary(const Struct& result) {
  const auto& fields = result.fields();
  std::string text = fields.at("rpc").string_value() + " " + fields.at("hidden_dtype").string_value() + ": ";
  if (fields.count("error")) return text + fields.at("error").string_value();
  text += "norms of the first partials";
  const auto& partials = fields.at("partials").list_value().values();
  for (int token = 0; token < std::min(5, partials.size()); token++) {
    double squares = 0;
    for (const double value : Row<double>(partials[token])) squares += value * value;
    text.append(" ").append(std::to_string(std::sqrt(squares)));
  }
  return text + "; pairs by expert " + ToJson(fields.at("receipt").struct_value());
}

int Run(const std::string& address, const std::string& input_file, const std::string& output_file) {
  Server server(address);
  const v1::GetShardResponse shard = server.GetShard();
  std::cout << shard.DebugString();
  const Input input = input_file.empty() ? RandomInput(shard) : ReadInput(input_file);
  if (input.tokens.empty()) throw std::runtime_error(input_file + " has no tokens; give at least one");
  Struct output;
  bool refused = false;
  Value& results = (*output.mutable_fields())["results"];
  const std::unique_ptr<Lane> lane = OpenLane(server, shard);
  std::vector<std::string> rpcs = {"Execute", "ExecuteStream"};
  if (lane) rpcs.push_back("SharedMemory");
  for (const std::string& rpc : rpcs) {
    for (const v1::DType hidden_dtype : {v1::DTYPE_FLOAT8_E4M3FN, v1::DTYPE_BFLOAT16}) {
      Struct& result = *results.mutable_list_value()->add_values()->mutable_struct_value();
      // A refusal is a result too.
      try {
        result = RunOne(server, lane.get(), shard, input, rpc, hidden_dtype);
      } catch (const Refused& error) {
        (*result.mutable_fields())["error"] = Text(error.what());
        refused = true;
      }
      (*result.mutable_fields())["rpc"] = Text(rpc);
      (*result.mutable_fields())["hidden_dtype"] = Text(v1::DType_Name(hidden_dtype));
      std::cout << Summary(result) << "\n";
    }
  }
  if (!output_file.empty()) {
    std::ofstream file(output_file);
    file << "{\"shard\":" << ToJson(shard) << "," << ToJson(output).substr(1);
    if (!file.flush()) throw std::runtime_error(output_file + " cannot be written");
  }
  return refused ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  try {
    if (words.size() == 1) return Run(words[0], "", "");
    if (words.size() == 5 && words[1] == "--input" && words[3] == "--output") return Run(words[0], words[2], words[4]);
    throw std::runtime_error("usage: client HOST:PORT [--input FILE --output FILE]");
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
