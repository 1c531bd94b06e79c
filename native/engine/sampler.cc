#include "engine/sampler.h"

#include <string_view>
#include <utility>

namespace expertd {
namespace {

std::string row_of(std::string_view rows, uint32_t tokens, uint32_t token) {
  const size_t bytes = rows.size() / tokens;
  return std::string(rows.substr(token * bytes, bytes));
}

}  // namespace

void Sampler::offer(const Job& job) {
  // Not by the library's distributions, whose choices are its own.
  const double chance = chance_() / (chance_.max() + 1.0);
  if (is_on_device(job.reach) || chance >= rate_) return;
  const Admitted& request = job.request;
  const uint32_t tokens = request.tokens, token = chance_() % tokens;
  // What is owned may be something else by the time that the sample is looked at.
  std::string ids;
  for (uint32_t i = 0; i < request.top_k; ++i) {
    const int32_t local = request.local_ids[size_t{token} * request.top_k + i];
    const int32_t global = local < 0 ? -1 : static_cast<int32_t>(request.owned->experts[local]);
    ids.append(reinterpret_cast<const char*>(&global), sizeof global);
  }
  const std::string_view sums(reinterpret_cast<const char*>(job.sums), request.computed_bytes());
  Sample sample{.model_fingerprint = request.placement->model_fingerprint,
                .layer = request.layer,
                .hidden_dtype = request.hidden_dtype,
                .sums_dtype = request.sums_dtype(),
                .hidden = row_of(request.hidden, tokens, token),
                .scales = row_of(request.scales, tokens, token),
                .ids = std::move(ids),
                .weights = row_of(request.weights, tokens, token),
                .sums = row_of(sums, tokens, token)};
  {
    const std::lock_guard lock(mutex_);
    if (waiting_.size() >= kWaiting) {
      dropped_.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    waiting_.push_back(std::move(sample));
  }
  changed_.notify_one();
}

std::optional<Sample> Sampler::take() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return interrupted_ || !waiting_.empty(); });
  if (interrupted_) return std::nullopt;
  Sample sample = std::move(waiting_.front());
  waiting_.pop_front();
  return sample;
}

void Sampler::interrupt() {
  {
    const std::lock_guard lock(mutex_);
    interrupted_ = true;
    waiting_.clear();
  }
  changed_.notify_all();
}

}  // namespace expertd
