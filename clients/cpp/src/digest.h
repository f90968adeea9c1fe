/// SHA-256.
#pragma once

#include <string>

namespace safelight {

/// The SHA-256 of bytes, 32 bytes. Throws std::runtime_error if OpenSSL does not have SHA-256.
std::string sha256(const std::string& data);

}  // namespace safelight
