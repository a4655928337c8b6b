// Where the time of an operation goes, by stage. While stages are recorded, a StageScope adds the time of its block to
// a stage, less what the scopes inside it take: the stages of a thread add up to the time of its outermost scopes.
// Otherwise a scope costs the test of a flag.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

namespace refine_fast {

enum class Stage : int8_t {
  setup,
  check,
  pack,
  multiply,
  scores,
  softmax,
  weights,
  gradients,
  select,
  rescore,
  finish,
  plan,
  read,
  compute,
  write,
  sync,
  callback,
  tokenize,
  forward,
  backward,
  optimize,
  wait_for_read,
  wait_for_write,
  wait,  // for the other threads of a parallel loop
};
constexpr int kStages = static_cast<int>(Stage::wait) + 1;

const char* stage_name(Stage stage);
// Whether there is a stage of that name; if so, *stage is it.
bool stage_from_name(const char* name, Stage* stage);

struct StageEvent {
  Stage stage;
  int thread;          // 0: the one that started the recording
  int64_t begin, end;  // nanoseconds of std::chrono::steady_clock
};
struct StageRecord {
  int64_t caller[kStages], others[kStages];  // nanoseconds: of the thread that started the recording, of all others
  std::vector<StageEvent> events;            // in the order in which they ended
  int64_t dropped;                           // events beyond the capacity
};

// One recording at a time; `capacity` limits the events, not the times.
void start_stages(int64_t capacity);
// Call it when no scope is open in another thread.
StageRecord stop_stages();

inline std::atomic<bool> recording_stages{false};

class StageScope {
 public:
  explicit StageScope(Stage stage) {
    if (recording_stages.load(std::memory_order_relaxed)) enter(stage);
  }
  ~StageScope() { close(); }
  StageScope(const StageScope&) = delete;
  StageScope& operator=(const StageScope&) = delete;
  void close() {
    if (begin_ >= 0) leave();
  }

  // The stage that this thread is in; setup outside of every scope.
  static Stage current();

 private:
  void enter(Stage stage);
  void leave();

  int64_t begin_ = -1;  // when the scope was entered
  int previous_ = -1;   // the stage around this one
};

}  // namespace refine_fast
