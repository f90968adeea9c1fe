#include <algorithm>
#include <chrono>

#include "c_handles.h"

namespace {

constexpr double kLongestWaitS = 1e8;  // three years: longer times overflow the clock

/// Waits on a condition; a negative time means without a limit.
template <typename Done>
void wait_for(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, double timeout_s, Done done) {
  if (timeout_s < 0 || timeout_s > kLongestWaitS) {
    changed.wait(lock, done);
  } else if (timeout_s > 0) {
    changed.wait_for(lock, std::chrono::duration<double>(timeout_s), done);
  }
}

bool has_ended(safelight_state state) { return state >= SAFELIGHT_STATE_SUCCEEDED; }

}  // namespace

safelight_generation::safelight_generation(std::shared_ptr<safelight::Client> of, safelight::Stream stream)
    : client(std::move(of)), stream_(std::move(stream)), thread_([this] { receive(); }) {}

safelight_generation::~safelight_generation() {
  close();
  thread_.join();
}

void safelight_generation::close() { stream_.close(); }

void safelight_generation::receive() noexcept {
  std::unique_ptr<safelight_error> failure;
  try {
    while (auto event = stream_.next()) take(*event);
  } catch (...) {
    safelight_error* told = nullptr;
    safelight::tell(&told);
    failure.reset(told);
  }
  std::lock_guard lock(mutex);
  if (failure) {
    error = std::move(failure);
    state = SAFELIGHT_STATE_FAILED;
  } else if (state != SAFELIGHT_STATE_SUCCEEDED) {
    state = SAFELIGHT_STATE_CLOSED;
  }
  changed.notify_all();
}

void safelight_generation::take(safelight::Event& event) {
  auto told = std::make_unique<safelight_event>();
  const auto with_image = [&told](safelight_image image) {
    told->output_index = image.image.output_index;
    told->step = image.step;
    told->image = std::make_shared<const safelight_image>(std::move(image));
  };
  if (auto* accepted = std::get_if<safelight::Accepted>(&event)) {
    told->kind = SAFELIGHT_EVENT_ACCEPTED;
    told->json = safelight::to_json(accepted->details);
  } else if (auto* progress = std::get_if<safelight::Progress>(&event)) {
    told->kind = SAFELIGHT_EVENT_PROGRESS;
    told->output_index = progress->output_index();
    told->step = progress->step();
    told->num_steps = progress->num_steps();
  } else if (auto* preview = std::get_if<safelight::Preview>(&event)) {
    told->kind = SAFELIGHT_EVENT_PREVIEW;
    told->num_dropped = preview->num_dropped;
    with_image({std::move(*preview), 0, preview->step});
  } else if (auto* picture = std::get_if<safelight::Picture>(&event)) {
    told->kind = SAFELIGHT_EVENT_PICTURE;
    with_image({std::move(*picture), picture->seed, 0});
  } else if (auto* finished = std::get_if<safelight::Finished>(&event)) {
    told->kind = SAFELIGHT_EVENT_FINISHED;
    told->json = safelight::to_json(finished->details);
  }
  std::lock_guard lock(mutex);
  if (told->kind == SAFELIGHT_EVENT_ACCEPTED) {
    if (name.empty()) name = std::get<safelight::Accepted>(event).generation;
    width_px = std::get<safelight::Accepted>(event).details.spec().width_px();
    height_px = std::get<safelight::Accepted>(event).details.spec().height_px();
    state = SAFELIGHT_STATE_ACCEPTED;
  } else if (told->kind == SAFELIGHT_EVENT_FINISHED) {
    state = SAFELIGHT_STATE_SUCCEEDED;
  } else {
    Output& output = outputs_[told->output_index];
    if (told->kind == SAFELIGHT_EVENT_PROGRESS) {
      output.step = told->step;
      output.num_steps = told->num_steps;
    } else {
      output.newest = told->image;
      output.polled = false;
      if (told->kind == SAFELIGHT_EVENT_PICTURE) output.picture = told->image;
    }
  }
  push(std::move(told));
  changed.notify_all();
}

/// Adds an event; it replaces an older progress or preview of the same output.
void safelight_generation::push(std::unique_ptr<safelight_event> event) {
  if (event->kind == SAFELIGHT_EVENT_PROGRESS || event->kind == SAFELIGHT_EVENT_PREVIEW) {
    const auto older = std::find_if(events_.begin(), events_.end(), [&event](const auto& one) {
      return one->kind == event->kind && one->output_index == event->output_index;
    });
    if (older != events_.end()) {
      if (event->kind == SAFELIGHT_EVENT_PREVIEW) event->num_dropped += (*older)->num_dropped + 1;
      events_.erase(older);
    }
  }
  events_.push_back(std::move(event));
}

std::unique_ptr<safelight_event> safelight_generation::next(double timeout_s) {
  std::unique_lock lock(mutex);
  wait_for(changed, lock, timeout_s, [this] { return !events_.empty() || has_ended(state); });
  if (events_.empty()) return nullptr;
  auto event = std::move(events_.front());
  events_.pop_front();
  return event;
}

safelight_state safelight_generation::wait(double timeout_s) {
  std::unique_lock lock(mutex);
  wait_for(changed, lock, timeout_s, [this] { return has_ended(state); });
  return state;
}

safelight_generation::Output safelight_generation::output(int32_t index) const {
  std::lock_guard lock(mutex);
  const auto found = outputs_.find(index);
  return found == outputs_.end() ? Output() : found->second;
}

int32_t safelight_generation::poll_rgba8(int32_t index, const safelight::Target& target, int32_t* width, int32_t* height,
                                         int32_t* step) {
  const Output known = output(index);
  if (known.polled) return SAFELIGHT_NOTHING_NEW;
  if (width) *width = known.newest->image.width_px;
  if (height) *height = known.newest->image.height_px;
  if (step) *step = known.newest->step;
  const int32_t result = safelight::copy_rgba8(known.newest->image, target);  // unlocked, as it may take milliseconds
  if (result == SAFELIGHT_COPIED) {
    std::lock_guard lock(mutex);
    Output& now = outputs_[index];
    if (now.newest == known.newest) now.polled = true;
  }
  return result;
}
