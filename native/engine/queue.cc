#include "engine/queue.h"

#include <algorithm>

namespace expertd {
namespace {

Lot* lot_of(Share* share, const Kind& kind) {
  const auto found =
      std::find_if(share->lots.begin(), share->lots.end(), [&](const Lot& lot) { return lot.kind == kind; });
  return found == share->lots.end() ? nullptr : &*found;
}

}  // namespace

void FairQueue::put(Job* job) {
  Share*& share = by_caller_[job->caller];
  if (share == nullptr) {
    shares_.push_back(Share{.caller = job->caller, .lots = {}, .place = {}});
    share = &shares_.back();
    share->place = std::prev(shares_.end());
  }
  Lot* lot = lot_of(share, job->kind());
  if (lot == nullptr) {
    share->lots.push_back(Lot{.kind = job->kind(), .first = nullptr, .last = nullptr, .place = {}});
    lot = &share->lots.back();
    lot->place = std::prev(share->lots.end());
  }
  job->share = share;
  job->lot = lot;
  job->next = nullptr;
  job->previous = lot->last;
  (lot->last ? lot->last->next : lot->first) = job;
  lot->last = job;
  tokens_ += job->tokens();
}

bool FairQueue::remove(Job* job) {
  if (job->lot == nullptr) return false;
  unlink(job);
  return true;
}

void FairQueue::unlink(Job* job) {
  Lot* lot = job->lot;
  Share* share = job->share;
  (job->previous ? job->previous->next : lot->first) = job->next;
  (job->next ? job->next->previous : lot->last) = job->previous;
  tokens_ -= job->tokens();
  job->previous = job->next = nullptr;
  job->share = nullptr;
  job->lot = nullptr;
  if (lot->first != nullptr) return;
  share->lots.erase(lot->place);
  if (!share->lots.empty()) return;
  by_caller_.erase(share->caller);
  shares_.erase(share->place);
}

std::vector<Job*> FairQueue::take(uint64_t max_tokens) {
  std::vector<Job*> taken;
  if (shares_.empty()) return taken;
  const Kind kind = shares_.front().lots.front().kind;
  const std::string turn = shares_.front().caller;
  std::vector<Lot*> sharing;
  for (Share& share : shares_) {
    if (Lot* lot = lot_of(&share, kind)) sharing.push_back(lot);
  }
  uint64_t room = max_tokens;
  while (!sharing.empty()) {
    std::vector<Lot*> left;
    for (Lot* lot : sharing) {
      Job* job = lot->first;
      if (!taken.empty() && job->tokens() > room) continue;
      if (job->next != nullptr) left.push_back(lot);
      unlink(job);  // a lot goes with its last job
      taken.push_back(job);
      room -= std::min<uint64_t>(job->tokens(), room);
    }
    sharing.swap(left);
  }
  if (const auto again = by_caller_.find(turn); again != by_caller_.end()) {
    shares_.splice(shares_.end(), shares_, again->second->place);
  }
  return taken;
}

std::vector<Job*> FairQueue::take_all() {
  std::vector<Job*> taken;
  while (!shares_.empty()) {
    taken.push_back(shares_.front().lots.front().first);
    unlink(taken.back());
  }
  return taken;
}

}  // namespace expertd
