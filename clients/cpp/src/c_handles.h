/// Defines the opaque types of safelight.h.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "safelight.h"
#include "safelight/client.h"

struct safelight_error {
  int32_t code = 0;
  std::string reason, message;
  double retry_after_s = -1;
  std::vector<std::pair<std::string, std::string>> violations;
};

struct safelight_options {
  std::string api_key;
  bool tls = false;
  grpc::SslCredentialsOptions pem;
  std::string server_name;
  double patience_s = 60;
  int32_t retries = 3;
  int32_t max_message_bytes = safelight::ClientOptions{}.max_message_bytes;
};

struct safelight_client {
  std::shared_ptr<safelight::Client> client;  // shared with its generations
};

struct safelight_request {
  safelight::v1::GenerateRequest message;
};

struct safelight_image {
  safelight::Image image;
  uint64_t seed = 0;
  int32_t step = 0;  // 0 for a picture
};

struct safelight_event {
  safelight_event_kind kind;
  int32_t output_index = 0, step = 0, num_steps = 0, num_dropped = 0;
  std::shared_ptr<const safelight_image> image;
  std::string json;
};

namespace safelight {

/// Sets `*error` to the exception that is being handled.
void tell(safelight_error** error) noexcept;
safelight_error* make_error(const Error& failure);

/// The caller's buffer for rows of RGBA8. Without a width, the image's width is used.
struct Target {
  void* pixels;
  std::size_t num_bytes, row_pitch;
  bool flip;
  int32_t width_px = 0, height_px = 0;
};

/// Copies raw pixels, scaled if the target has another size. Returns SAFELIGHT_COPIED, TOO_SMALL or NOT_RAW.
int32_t copy_rgba8(const Image& image, const Target& target);
std::string to_json(const google::protobuf::Message& message);
char* copied(const std::string& text);

/// Runs `work` and returns its result; on an exception returns `fallback` and sets `*error` if `error` is not null.
template <typename Value, typename Work>
Value guarded(safelight_error** error, Value fallback, Work work) noexcept {
  if (error) *error = nullptr;
  try {
    return work();
  } catch (...) {
    tell(error);
    return fallback;
  }
}

}  // namespace safelight

/// A generation with the thread that receives it. Its memory is bounded: it keeps the newest preview and progress of each
/// output, and the events that come once.
struct safelight_generation {
  safelight_generation(std::shared_ptr<safelight::Client> client, safelight::Stream stream);
  ~safelight_generation();

  struct Output {
    int32_t step = 0, num_steps = 0;
    std::shared_ptr<const safelight_image> newest, picture;
    bool polled = true;  // whether poll_rgba8 has copied the newest image
  };

  void close();
  std::unique_ptr<safelight_event> next(double timeout_s);
  safelight_state wait(double timeout_s);
  int32_t poll_rgba8(int32_t index, const safelight::Target& target, int32_t* width_px, int32_t* height_px,
                     int32_t* step);
  /// A copy of the state of an output.
  Output output(int32_t index) const;

  const std::shared_ptr<safelight::Client> client;

  mutable std::mutex mutex;  // protects all members below except the stream and the thread
  std::condition_variable changed;
  safelight_state state = SAFELIGHT_STATE_ASKED;
  int32_t width_px = 0, height_px = 0;
  std::string name;  // set once, since its address is given to callers
  std::unique_ptr<safelight_error> error;

 private:
  void receive() noexcept;
  void take(safelight::Event& event);
  void push(std::unique_ptr<safelight_event> event);

  std::map<int32_t, Output> outputs_;
  std::deque<std::unique_ptr<safelight_event>> events_;
  safelight::Stream stream_;
  std::thread thread_;  // the last member, since the thread uses the others
};
