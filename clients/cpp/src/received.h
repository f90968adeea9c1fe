/// What was received of a generation so far, over all connections.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "safelight/event.h"

namespace safelight {

class Received {
 public:
  Received(std::size_t at, std::optional<v1::PreviewPolicy> preview, std::string name)
      : at(at), name(std::move(name)), preview_(std::move(preview)) {}

  /// The event that a message is for the caller; empty for a piece of a picture and for details of the protocol. The
  /// message's bytes are moved out of it. Throws Error if a picture arrived damaged.
  std::optional<Event> take(v1::GenerationEvent& message);

  /// The request that continues where the last connection ended.
  v1::WatchGenerationRequest watch() const;

  std::size_t at;  ///< Index of the server that the generation uses.
  std::string name;
  std::uint64_t num_events = 0;
  bool finished = false;
  bool durable = false;  ///< Whether another server can continue it.

 private:
  std::optional<Event> take_chunk(v1::ArtifactChunk& chunk);
  bool previews_are_bottom_up(const std::string& media_type) const;

  std::optional<v1::PreviewPolicy> preview_;
  std::uint64_t sequence_ = 0;
  v1::Accepted accepted_;
  struct Part {
    std::string data;
    std::int64_t num_bytes = 0;  ///< Bytes received so far; the data itself is moved to the caller with the picture.
  };
  std::map<int, Part> parts_;
};

}  // namespace safelight
