#include "engine/admission.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace expertd {
namespace {

// Seconds; a server that is this far behind is better judged again then than trusted with a longer estimate.
constexpr double kLongestDelay = 5.0, kShortestDelay = 0.001;
// Of the newest batch in the moving average of the device's rate.
constexpr double kNewestShare = 0.1;
constexpr char kElsewhere[] = ": retry later or use another replica";

Amount amount_of(const Job& job) { return {job.tokens(), job.num_bytes()}; }

}  // namespace

std::optional<Refusal> Admission::check(const std::string& identity, Amount more) const {
  const std::lock_guard lock(mutex_);
  const Measure bound = exceeded(more);
  if (bound == nullptr || largest(bound, identity, more) != nullptr) return std::nullopt;
  return full(bound, more);
}

std::optional<Refusal> Admission::admit(const std::shared_ptr<Job>& job, std::vector<Evicted>* evicted) {
  const std::lock_guard lock(mutex_);
  const Amount more = amount_of(*job);
  std::vector<Evicted> leaving;
  while (const Measure bound = exceeded(more)) {
    const Holding* most = largest(bound, job->identity, more);
    if (most == nullptr) {
      for (auto left = leaving.rbegin(); left != leaving.rend(); ++left) hold(left->job);
      return full(bound, more);
    }
    leaving.push_back({most->jobs.back(), this->evicted(bound, most->amount.*bound)});
    drop(*leaving.back().job);
  }
  hold(job);
  for (Evicted& one : leaving) {
    one.refusal.retry_after = delay(one.job->tokens(), most_.tokens);
    evicted->push_back(std::move(one));
  }
  return std::nullopt;
}

bool Admission::release(Job& job) {
  const std::lock_guard lock(mutex_);
  if (!job.room) return false;
  drop(job);
  return true;
}

void Admission::computed(uint64_t tokens, double seconds, bool express) {
  const double rate = static_cast<double>(tokens) / std::max(seconds, 1e-6);
  const std::lock_guard lock(mutex_);
  double& average = express ? express_tokens_per_second_ : tokens_per_second_;
  average += (rate - average) * (average > 0 ? kNewestShare : 1.0);
}

Amount Admission::waiting() const {
  const std::lock_guard lock(mutex_);
  return waiting_;
}

Admission::Measure Admission::exceeded(Amount more) const {
  for (const Measure measure : {&Amount::tokens, &Amount::bytes}) {
    if (waiting_.*measure + more.*measure > most_.*measure) return measure;
  }
  return nullptr;
}

const Admission::Holding* Admission::largest(Measure measure, const std::string& identity, Amount more) const {
  const auto own = holdings_.find(identity);
  uint64_t most = more.*measure + (own == holdings_.end() ? 0 : own->second.amount.*measure);
  const Holding* found = nullptr;
  for (const auto& [name, holding] : holdings_) {
    if (holding.amount.*measure <= most) continue;
    most = holding.amount.*measure;
    found = &holding;
  }
  return found;
}

void Admission::hold(const std::shared_ptr<Job>& job) {
  Holding& holding = holdings_[job->identity];
  const Amount more = amount_of(*job);
  job->room = holding.jobs.insert(holding.jobs.end(), job);
  for (const Measure measure : {&Amount::tokens, &Amount::bytes}) {
    holding.amount.*measure += more.*measure;
    waiting_.*measure += more.*measure;
  }
}

void Admission::drop(Job& job) {
  const auto found = holdings_.find(job.identity);
  Holding& holding = found->second;
  const Amount less = amount_of(job);
  for (const Measure measure : {&Amount::tokens, &Amount::bytes}) {
    holding.amount.*measure -= less.*measure;
    waiting_.*measure -= less.*measure;
  }
  const auto place = *std::exchange(job.room, std::nullopt);
  holding.jobs.erase(place);
  if (holding.jobs.empty()) holdings_.erase(found);
}

Refusal Admission::full(Measure bound, Amount more) const {
  const bool tokens = bound == &Amount::tokens;
  const std::string text = std::to_string(waiting_.*bound) + (tokens ? " tokens" : " bytes") + " are queued and " +
                           (tokens ? "num_tokens is " : "the request's tensors have ") + std::to_string(more.*bound) +
                           "; at most " + std::to_string(most_.*bound) + " may wait" + kElsewhere;
  return {Code::kResourceExhausted, text, delay(more.tokens, tokens ? most_.tokens : waiting_.tokens)};
}

Refusal Admission::evicted(Measure bound, uint64_t held) const {
  const std::string text = "the request left the queue for another caller's: at most " + std::to_string(most_.*bound) +
                           (bound == &Amount::tokens ? " tokens" : " bytes") + " may wait, and " +
                           std::to_string(held) + " were this caller's, more than anybody's" + kElsewhere;
  return {Code::kResourceExhausted, text};
}

// `tokens` fit into `room` once half of the queue is gone: a full queue soon fills up again.
std::optional<double> Admission::delay(uint64_t tokens, uint64_t room) const {
  // Express batches are of few tokens, and beside others: they tell the rate only while nothing else does.
  const double rate = tokens_per_second_ > 0 ? tokens_per_second_ : express_tokens_per_second_;
  if (rate <= 0) return std::nullopt;
  const auto queued = static_cast<double>(waiting_.tokens);
  const double ahead =
      std::max(queued + static_cast<double>(tokens) - static_cast<double>(room), std::floor(queued / 2));
  return std::clamp(ahead / rate, kShortestDelay, kLongestDelay);
}

}  // namespace expertd
