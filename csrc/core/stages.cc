#include "core/stages.h"

#include <chrono>
#include <cstring>

namespace refine_fast {
namespace {

constexpr const char* kNames[kStages] = {
    "setup",    "check",    "pack",    "multiply", "scores",   "softmax",       "weights",        "gradients",
    "select",   "rescore",  "finish",  "plan",     "read",     "compute",       "write",          "sync",
    "callback", "tokenize", "forward", "backward", "optimize", "wait for read", "wait for write", "wait"};

std::atomic<int64_t> caller[kStages], others[kStages];
std::vector<StageEvent> events;
std::atomic<int64_t> event_count;
std::atomic<int> threads, recordings;

struct ThreadState {
  int stage = -1, number = 0, recording = 0;
  int64_t since = 0;
};
thread_local ThreadState state;

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Adds the time since the thread's last change of stage to the stage that it was in.
void count(int64_t time) {
  if (state.stage >= 0) (state.number == 0 ? caller : others)[state.stage] += time - state.since;
  state.since = time;
}

}  // namespace

const char* stage_name(Stage stage) { return kNames[static_cast<int>(stage)]; }

bool stage_from_name(const char* name, Stage* stage) {
  for (int i = 0; i < kStages; ++i)
    if (std::strcmp(kNames[i], name) == 0) return *stage = static_cast<Stage>(i), true;
  return false;
}

void start_stages(int64_t capacity) {
  for (int i = 0; i < kStages; ++i) caller[i] = others[i] = 0;
  events.assign(static_cast<size_t>(capacity), {});
  event_count = 0, threads = 1;
  state = {-1, 0, ++recordings, 0};
  recording_stages = true;
}

StageRecord stop_stages() {
  recording_stages = false;
  StageRecord record{};
  for (int i = 0; i < kStages; ++i) record.caller[i] = caller[i], record.others[i] = others[i];
  const auto capacity = static_cast<int64_t>(events.size()), made = event_count.load();
  record.dropped = made > capacity ? made - capacity : 0;
  events.resize(static_cast<size_t>(made - record.dropped));
  record.events.swap(events);
  return record;
}

Stage StageScope::current() { return state.stage < 0 ? Stage::setup : static_cast<Stage>(state.stage); }

void StageScope::enter(Stage stage) {
  const int recording = recordings.load(std::memory_order_relaxed);
  if (state.recording != recording) state = {-1, threads++, recording, 0};
  begin_ = now(), previous_ = state.stage;
  count(begin_);
  state.stage = static_cast<int>(stage);
}

void StageScope::leave() {
  const int64_t end = now();
  count(end);
  const int64_t at = event_count++;
  if (at < static_cast<int64_t>(events.size()))
    events[static_cast<size_t>(at)] = {static_cast<Stage>(state.stage), state.number, begin_, end};
  state.stage = previous_, begin_ = -1;
}

}  // namespace refine_fast
