#include "engine/queue.h"

#include <algorithm>
#include <deque>
#include <utility>

namespace expertd {
namespace {

Lot* lot_of(Line* line, const Kind& kind) {
  const auto found =
      std::find_if(line->lots.begin(), line->lots.end(), [&](const Lot& lot) { return lot.kind == kind; });
  return found == line->lots.end() ? nullptr : &*found;
}

// Of the job that waits longest.
const Lot& oldest_of(const Line& line) {
  return *std::min_element(line.lots.begin(), line.lots.end(),
                           [](const Lot& one, const Lot& other) { return one.first->number < other.first->number; });
}

template <typename Part>
Part* append(std::list<Part>* parts, Part part) {
  parts->push_back(std::move(part));
  parts->back().place = std::prev(parts->end());
  return &parts->back();
}

// The next job of an identity's connections, which take turns, of at most `room` tokens; null when there is none.
Job* next_of(std::deque<Lot*>* lots, uint64_t room) {
  while (!lots->empty()) {
    Lot* lot = lots->front();
    lots->pop_front();
    Job* job = lot->first;
    if (job->tokens() > room) continue;
    if (job->next != nullptr) lots->push_back(lot);
    return job;
  }
  return nullptr;
}

}  // namespace

void FairQueue::put(Job* job) {
  Share*& share = by_identity_[job->identity];
  if (share == nullptr) share = append(&shares_, Share{.identity = job->identity});
  Line*& line = share->by_caller[job->caller];
  if (line == nullptr) line = append(&share->lines, Line{.caller = job->caller, .share = share});
  Lot* lot = lot_of(line, job->kind());
  if (lot == nullptr) lot = append(&line->lots, Lot{.kind = job->kind(), .line = line});
  job->lot = lot;
  job->number = ++last_number_;
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

// What has no more jobs goes with its last.
void FairQueue::unlink(Job* job) {
  Lot* lot = std::exchange(job->lot, nullptr);
  Line* line = lot->line;
  Share* share = line->share;
  (job->previous ? job->previous->next : lot->first) = job->next;
  (job->next ? job->next->previous : lot->last) = job->previous;
  job->previous = job->next = nullptr;
  tokens_ -= job->tokens();
  if (lot->first != nullptr) return;
  line->lots.erase(lot->place);
  if (!line->lots.empty()) return;
  share->by_caller.erase(line->caller);
  share->lines.erase(line->place);
  if (!share->lines.empty()) return;
  by_identity_.erase(share->identity);
  shares_.erase(share->place);
}

std::vector<Job*> FairQueue::take(uint64_t max_tokens) {
  std::vector<Job*> taken;
  if (shares_.empty()) return taken;
  const Line& turn = shares_.front().lines.front();
  const Kind kind = oldest_of(turn).kind;
  const std::string identity = shares_.front().identity, caller = turn.caller;
  std::list<std::deque<Lot*>> sharing;
  for (Share& share : shares_) {
    std::deque<Lot*>& lots = sharing.emplace_back();
    for (Line& line : share.lines) {
      if (Lot* lot = lot_of(&line, kind)) lots.push_back(lot);
    }
  }
  for (uint64_t room = max_tokens; !sharing.empty();) {
    for (auto& lots : sharing) {
      Job* job = next_of(&lots, taken.empty() ? ~uint64_t{0} : room);
      if (job == nullptr) continue;
      unlink(job);
      taken.push_back(job);
      room -= std::min<uint64_t>(job->tokens(), room);
    }
    sharing.remove_if([](const auto& lots) { return lots.empty(); });
  }
  end_turn(identity, caller);
  return taken;
}

void FairQueue::end_turn(const std::string& identity, const std::string& caller) {
  const auto share = by_identity_.find(identity);
  if (share == by_identity_.end()) return;
  shares_.splice(shares_.end(), shares_, share->second->place);
  auto& [name, lines, by_caller, place] = *share->second;
  if (const auto line = by_caller.find(caller); line != by_caller.end()) {
    lines.splice(lines.end(), lines, line->second->place);
  }
}

std::vector<Job*> FairQueue::take_all() {
  std::vector<Job*> taken;
  while (!shares_.empty()) {
    taken.push_back(shares_.front().lines.front().lots.front().first);
    unlink(taken.back());
  }
  return taken;
}

}  // namespace expertd
