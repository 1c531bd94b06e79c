#include "engine/inbox.h"

namespace expertd {

uint64_t Inbox::open(std::shared_ptr<Job> job) {
  bell_.arm();
  jobs_.emplace(++last_ticket_, std::move(job));
  return last_ticket_;
}

std::shared_ptr<Job> Inbox::find(uint64_t ticket) const {
  const auto found = jobs_.find(ticket);
  return found == jobs_.end() ? nullptr : found->second;
}

void Inbox::push(Answer answer) {
  answers_.add(std::move(answer));
  bell_.ring();
}

std::vector<Inbox::Answer> Inbox::drain() {
  bell_.disarm();
  // Armed before the look: what comes later rings.
  bell_.arm();
  return answers_.take();
}

}  // namespace expertd
