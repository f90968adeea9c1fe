#include "received.h"

#include <openssl/evp.h>

#include <algorithm>

#include "digest.h"
#include "safelight/error.h"

namespace safelight {
namespace {

template <typename Message>
void fill(Image& image, Message& message) {
  image.output_index = message.output_index();
  image.media_type = message.media_type();
  image.width_px = message.width_px();
  image.height_px = message.height_px();
  image.stride_bytes = message.stride_bytes();
}

}  // namespace

std::string sha256(const std::string& data) {
  std::string digest(EVP_MAX_MD_SIZE, '\0');
  unsigned int size = 0;
  if (EVP_Digest(data.data(), data.size(), reinterpret_cast<unsigned char*>(digest.data()), &size, EVP_sha256(),
                 nullptr) != 1) {
    throw std::runtime_error("this OpenSSL has no SHA-256");
  }
  digest.resize(size);
  return digest;
}

v1::WatchGenerationRequest Received::watch() const {
  v1::WatchGenerationRequest request;
  request.set_name(name);
  request.set_after_sequence(sequence_);
  if (preview_) *request.mutable_preview() = *preview_;
  for (const auto& [index, part] : parts_) {
    auto* offset = request.add_artifact_offsets();
    offset->set_output_index(index);
    offset->set_offset(part.num_bytes);
  }
  return request;
}

std::optional<Event> Received::take(v1::GenerationEvent& message) {
  name = message.generation();
  ++num_events;
  sequence_ = std::max(sequence_, message.sequence());
  switch (message.event_case()) {
    case v1::GenerationEvent::kAccepted:
      accepted_ = message.accepted();
      durable = accepted_.durability() == v1::Accepted::DURABILITY_REPLICATED;
      return Accepted{name, std::move(*message.mutable_accepted())};
    case v1::GenerationEvent::kProgress:
      return std::move(*message.mutable_progress());
    case v1::GenerationEvent::kPreview: {
      auto& given = *message.mutable_preview();
      Preview preview;
      fill(preview, given);
      preview.bottom_up = previews_are_bottom_up(preview.media_type);
      preview.data = std::move(*given.mutable_data());
      preview.step = given.step();
      preview.num_dropped = given.num_dropped();
      preview.method = given.method();
      return preview;
    }
    case v1::GenerationEvent::kArtifactChunk:
      return take_chunk(*message.mutable_artifact_chunk());
    case v1::GenerationEvent::kFinished:
      finished = true;
      if (message.finished().status().code() != 0) return {};  // the call ends with the same status
      return Finished{name, std::move(*message.mutable_finished())};
    default:
      return {};
  }
}

std::optional<Event> Received::take_chunk(v1::ArtifactChunk& chunk) {
  const int index = chunk.output_index();
  Part& part = parts_[index];
  if (chunk.offset() != part.num_bytes) return {};
  part.num_bytes += static_cast<std::int64_t>(chunk.data().size());
  part.data += chunk.data();
  if (part.num_bytes < chunk.total_bytes() || chunk.sha256().empty()) return {};
  if (sha256(part.data) != chunk.sha256()) {
    throw Error({grpc::StatusCode::DATA_LOSS, "output " + std::to_string(index) + " arrived damaged"});
  }
  Picture picture;
  fill(picture, chunk);
  picture.bottom_up = picture.stride_bytes > 0 &&
                      accepted_.encoding().row_order() == v1::PixelEncoding::ROW_ORDER_BOTTOM_UP;
  picture.data = std::move(part.data);
  if (index < accepted_.spec().outputs_size()) picture.seed = accepted_.spec().outputs(index).seed();
  return picture;
}

bool Received::previews_are_bottom_up(const std::string& media_type) const {
  if (!preview_) return false;
  for (const auto& accepted : preview_->accept()) {
    if (accepted.media_type() == media_type) return accepted.row_order() == v1::PixelEncoding::ROW_ORDER_BOTTOM_UP;
  }
  return false;
}

}  // namespace safelight
