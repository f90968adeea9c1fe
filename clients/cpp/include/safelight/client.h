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
  /// For TLS, such as grpc::SslCredentials; null: plain text.
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  /// The name in the server's certificate, where it differs from the target's.
  std::string server_name;
  /// How long a generation whose connection is lost is asked for again, since its last event. At most 5 s while
  /// nothing was received.
  std::chrono::milliseconds patience{60'000};
  /// How often a request is sent again that the server has refused with the time after which to retry. The client
  /// waits as long as the server says, within its patience and the deadline.
  int retries = 3;
  /// The largest message that is received; a larger one is RESOURCE_EXHAUSTED.
  int max_message_bytes = 4 << 20;
};

/// The events of one generation, in order: Accepted, Progress, Preview and Picture as they come, then Finished.
///
/// Read by one thread at a time; close() may come from any. A server whose last stream was closed suspends the
/// generation, and cancels it after its grace.
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

  /// Ends the stream, and wakes a thread that waits in next().
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

/// A connection to a server, or to several replicas of one. May be used by several threads at once, and ended before its
/// streams.
class Client {
 public:
  class Impl;

  /// `target` is "host:port", or another form that gRPC takes. Several replicas are separated by commas: when one is
  /// lost, the next one is asked, and goes on with each generation that was accepted as replicated. Nothing is connected
  /// before the first call. Throws std::invalid_argument: the target names no server, or the key cannot be sent.
  explicit Client(const std::string& target, ClientOptions options = {});
  ~Client();

  /// Starts a generation and watches it. A request without a request_id gets one, so that it can be sent again without
  /// running twice. `timeout` is the deadline of the generation, over all connections.
  Stream generate(v1::GenerateRequest request, std::optional<std::chrono::nanoseconds> timeout = {});

  /// Watches a generation that exists, "generations/ID", from its first event on: a second screen.
  Stream watch(std::string generation, std::optional<v1::PreviewPolicy> preview = {},
               std::optional<std::chrono::nanoseconds> timeout = {});

  /// What is known of a generation. Throws Error, as those below do.
  v1::Generation get(const std::string& generation);

  /// Stops a generation. Returns it as it ended, with the step that each output had reached.
  v1::Generation cancel(const std::string& generation);

  /// Sends a picture: PNG, JPEG or WebP. Its name can then be the init_image or the mask of a spec, for as long as the
  /// server keeps it.
  v1::Image upload_image(const std::string& data);

  /// All models of the server.
  std::vector<v1::Model> models();

  /// The connection to the current server, for stubs of other services.
  std::shared_ptr<grpc::Channel> channel() const;

 private:
  std::shared_ptr<Impl> impl_;
};

}  // namespace safelight
