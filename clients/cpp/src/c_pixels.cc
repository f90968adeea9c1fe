#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "c_handles.h"

namespace safelight {
namespace {

/// The position of a target pixel between two source pixels, along one axis.
struct Between {
  Between(int32_t at, int32_t num_to, int32_t num_from) {
    const float exact = (static_cast<float>(at) + 0.5f) * static_cast<float>(num_from) / static_cast<float>(num_to) - 0.5f;
    const float inside = std::clamp(exact, 0.0f, static_cast<float>(num_from - 1));
    first = static_cast<std::size_t>(inside);
    second = std::min(first + 1, static_cast<std::size_t>(num_from - 1));
    weight = inside - static_cast<float>(first);
  }
  std::size_t first, second;
  float weight;  // of the second pixel
};

float mixed(float one, float other, float weight) { return one + (other - one) * weight; }

}  // namespace

int32_t copy_rgba8(const Image& image, const Target& target) {
  if (image.stride_bytes <= 0 || image.width_px <= 0 || image.height_px <= 0) return SAFELIGHT_NOT_RAW;
  const std::size_t from_row_bytes = 4 * static_cast<std::size_t>(image.width_px);
  const std::size_t stride = static_cast<std::size_t>(image.stride_bytes);
  const std::size_t from_last = static_cast<std::size_t>(image.height_px) - 1;
  if (stride < from_row_bytes || image.data.size() < from_last * stride + from_row_bytes) return SAFELIGHT_NOT_RAW;

  const int32_t width = target.width_px ? target.width_px : image.width_px;
  const int32_t height = target.height_px ? target.height_px : image.height_px;
  if (!target.pixels || width < 0 || height < 0) return SAFELIGHT_TOO_SMALL;
  const std::size_t row_bytes = 4 * static_cast<std::size_t>(width);
  const std::size_t last = static_cast<std::size_t>(height) - 1;
  const std::size_t pitch = target.row_pitch ? target.row_pitch : row_bytes;
  // A division, since with a caller's very large pitch a product would overflow.
  if (pitch < row_bytes || target.num_bytes < row_bytes || (last && (target.num_bytes - row_bytes) / last < pitch)) {
    return SAFELIGHT_TOO_SMALL;
  }

  const auto* from = reinterpret_cast<const std::uint8_t*>(image.data.data());
  const auto from_row = [&](std::size_t row) { return from + (image.bottom_up ? from_last - row : row) * stride; };
  for (std::size_t row = 0; row <= last; ++row) {  // from the top
    auto* to = static_cast<std::uint8_t*>(target.pixels) + (target.flip ? last - row : row) * pitch;
    if (width == image.width_px && height == image.height_px) {
      std::memcpy(to, from_row(row), row_bytes);
      continue;
    }
    const Between y(static_cast<int32_t>(row), height, image.height_px);
    const std::uint8_t* upper = from_row(y.first);
    const std::uint8_t* lower = from_row(y.second);
    for (int32_t column = 0; column < width; ++column) {
      const Between x(column, width, image.width_px);
      for (std::size_t channel = 0; channel < 4; ++channel) {
        const std::size_t left = 4 * x.first + channel, right = 4 * x.second + channel;
        *to++ = static_cast<std::uint8_t>(std::lround(
            mixed(mixed(upper[left], upper[right], x.weight), mixed(lower[left], lower[right], x.weight), y.weight)));
      }
    }
  }
  return SAFELIGHT_COPIED;
}

}  // namespace safelight
