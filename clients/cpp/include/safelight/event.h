#pragma once

#include <cstdint>
#include <string>
#include <variant>

#include "safelight/v1/generation.pb.h"

namespace safelight {

/// The first event: the request was admitted.
struct Accepted {
  std::string generation;  ///< Its name, "generations/ID", for Client::watch and Client::cancel.
  v1::Accepted details;
};

/// An output has made a denoising step.
using Progress = v1::Progress;

/// The pixels of a preview or of a picture, encoded as `media_type` says.
struct Image {
  int output_index = 0;
  std::string media_type;
  int width_px = 0;
  int height_px = 0;
  int stride_bytes = 0;    ///< Bytes from one row to the next for raw pixels, else 0.
  bool bottom_up = false;  ///< Whether the first of the raw rows is the lowest one.
  std::string data;
};

/// How an output looks after `step` steps.
struct Preview : Image {
  int step = 0;
  int num_dropped = 0;  ///< Previews that were skipped since the previous one, because the reader was slow.
  v1::PreviewMethod method = v1::PREVIEW_METHOD_UNSPECIFIED;
};

/// A finished picture. Its SHA-256 has been checked.
struct Picture : Image {
  std::uint64_t seed = 0;
};

/// The last event: the generation has succeeded.
struct Finished {
  std::string generation;
  v1::Finished details;
};

using Event = std::variant<Accepted, Progress, Preview, Picture, Finished>;

}  // namespace safelight
