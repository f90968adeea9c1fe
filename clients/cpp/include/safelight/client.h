/// Client of a Safelight server: text to image, with previews while the picture is computed.
#pragma once

#include <chrono>
#include <cstddef>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <grpcpp/channel.h>
#include <grpcpp/security/credentials.h>

#include "safelight/error.h"
#include "safelight/event.h"
#include "safelight/v1/images.pb.h"
#include "safelight/v1/models.pb.h"

namespace safelight {

struct ClientOptions {
  /// Sent as a bearer token; empty: none. Visible ASCII characters.
  std::string api_key;
  /// Credentials for TLS, such as grpc::SslCredentials; null: plain text.
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  /// The name in the server's certificate, where it differs from the target's.
  std::string server_name;
  /// How long the client tries to resume a generation after a lost connection, counted from its last event. At most 5 s
  /// before the first event.
  std::chrono::milliseconds patience{60'000};
  /// How often a refused request is sent again if the refusal says after which time. The client waits for that time,
  /// within its patience and the deadline.
  int retries = 3;
  /// The largest message that is received; a larger one is RESOURCE_EXHAUSTED.
  int max_message_bytes = 4 << 20;
};

/// The events of one generation, in order: Accepted, Progress, Preview and Picture as they come, then Finished.
///
/// One thread at a time may read it; any thread may call close(). When the last stream was closed, the server suspends the
/// generation, and cancels it after its grace period.
class Stream {
 public:
  class Impl;

  explicit Stream(std::unique_ptr<Impl> impl);
  Stream(Stream&&) noexcept;
  Stream& operator=(Stream&&) noexcept;
  ~Stream();  ///< Closes the stream.

  /// Waits for the next event; empty after the last one, and after close().
  /// Throws Error: the request was refused, the generation failed, or it could not be resumed.
  std::optional<Event> next();

  /// Ends the stream and wakes a thread that waits in next().
  void close();

  struct End {};
  class Iterator {
   public:
    using iterator_category = std::input_iterator_tag;
    using value_type = Event;
    using difference_type = std::ptrdiff_t;
    using pointer = Event*;
    using reference = Event&;

    explicit Iterator(Stream& stream) : stream_(&stream), event_(stream.next()) {}
    Event& operator*() { return *event_; }
    Event* operator->() { return &*event_; }
    Iterator& operator++() {
      event_ = stream_->next();
      return *this;
    }
    void operator++(int) { ++*this; }
    friend bool operator==(const Iterator& one, End) { return !one.event_; }
    friend bool operator!=(const Iterator& one, End) { return one.event_.has_value(); }

   private:
    Stream* stream_;
    std::optional<Event> event_;
  };
  Iterator begin() { return Iterator(*this); }
  End end() { return {}; }

 private:
  std::unique_ptr<Impl> impl_;
};

/// A connection to a server, or to several replicas of one. Several threads may use it at once. It may be destroyed before
/// its streams.
class Client {
 public:
  class Impl;

  /// `target` is "host:port", or another form that gRPC supports. Several replicas are separated by commas: if one fails,
  /// the client calls the next one, which continues each generation that was accepted as replicated. Nothing is connected
  /// before the first call. Throws std::invalid_argument if the target names no server, or if the key cannot be sent.
  explicit Client(const std::string& target, ClientOptions options = {});
  ~Client();

  /// Starts a generation and returns its events. A request without a request_id gets one, so that it can be sent again
  /// without running twice. `timeout` is the deadline of the generation, over all connections.
  Stream generate(v1::GenerateRequest request, std::optional<std::chrono::nanoseconds> timeout = {});

  /// Watches an existing generation, "generations/ID", from its first event on.
  Stream watch(std::string generation, std::optional<v1::PreviewPolicy> preview = {},
               std::optional<std::chrono::nanoseconds> timeout = {});

  /// Returns the present state of a generation. Throws Error if the call fails, as the functions below do.
  v1::Generation get(const std::string& generation);

  /// Stops a generation and returns its final state, with the step that each output had reached.
  v1::Generation cancel(const std::string& generation);

  /// Uploads a picture: PNG, JPEG or WebP. Its name can then be the init_image or the mask of a spec, for as long as the
  /// server keeps it.
  v1::Image upload_image(const std::string& data);

  /// Returns all models of the server.
  std::vector<v1::Model> models();

  /// The connection to the current server, for stubs of other services.
  std::shared_ptr<grpc::Channel> channel() const;

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace safelight
