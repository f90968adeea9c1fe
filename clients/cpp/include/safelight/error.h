#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include <grpcpp/support/status.h>

namespace safelight {

/// Why the server refused a call, why a generation failed, or that no server could be reached.
class Error : public std::runtime_error {
 public:
  explicit Error(grpc::Status status);

  grpc::StatusCode code() const { return status_.error_code(); }

  /// A stable name for programs, such as "QUEUE_FULL"; empty if the server sent none.
  const std::string& reason() const { return reason_; }

  /// What to change in an invalid request: a description by the path of each field.
  const std::map<std::string, std::string>& violations() const { return violations_; }

  /// The time after which to retry; absent if the server sent none.
  std::optional<std::chrono::nanoseconds> retry_after() const { return retry_after_; }

  /// The gRPC status, with its details as bytes.
  const grpc::Status& status() const { return status_; }

 private:
  grpc::Status status_;
  std::string reason_;
  std::map<std::string, std::string> violations_;
  std::optional<std::chrono::nanoseconds> retry_after_;
};

/// The name of a code in gRPC's specification, such as "RESOURCE_EXHAUSTED".
const char* code_name(grpc::StatusCode code);

}  // namespace safelight
