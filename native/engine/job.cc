#include "engine/job.h"

#include <new>

#include "tokens/quantize.h"

namespace expertd {

void Job::put_reply(std::byte* place) {
  reply = place;
  own_sums = request.rounds();
  if (request.rounds()) computed_.reset(new (std::nothrow) std::byte[request.computed_bytes()]);
  sums = request.rounds() ? computed_.get() : place;
}

void Job::round() {
  if (!request.rounds()) return;
  const uint64_t tokens = request.tokens, width = request.placement->hidden_size;
  const auto row = [=](auto bytes_of, Dtype dtype) { return static_cast<ptrdiff_t>(bytes_of(dtype, 1, width)); };
  std::byte* const scales = reply + values_bytes(request.reply_dtype, tokens, width);
  quantize({sums, row(values_bytes, Dtype::kFloat32)}, Format::float32, tokens, width,
           {reply, row(values_bytes, request.reply_dtype)}, {scales, row(scales_bytes, request.reply_dtype)});
  computed_.reset();
  sums = nullptr;
}

}  // namespace expertd
