#include "safelight/error.h"

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace safelight {

const char* code_name(grpc::StatusCode code) {
  static constexpr const char* names[] = {
      "OK",        "CANCELLED",          "UNKNOWN",          "INVALID_ARGUMENT",    "DEADLINE_EXCEEDED",   "NOT_FOUND",
      "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
      "UNIMPLEMENTED",  "INTERNAL",          "UNAVAILABLE",        "DATA_LOSS",           "UNAUTHENTICATED"};
  return code >= 0 && code <= grpc::UNAUTHENTICATED ? names[code] : "UNKNOWN";
}

namespace {

/// A server that stops ends calls as CANCELLED without details; that counts as a lost connection. A stream that is closed
/// here gives no error at all.
grpc::Status as_lost(const grpc::Status& status) {
  if (status.error_code() != grpc::CANCELLED || !status.error_details().empty()) return status;
  return {grpc::UNAVAILABLE, "the call was cancelled, and not by its caller: " + status.error_message()};
}

std::string text(const grpc::Status& status) {
  return std::string(code_name(status.error_code())) + ": " + status.error_message();
}

}  // namespace

Error::Error(grpc::Status status) : std::runtime_error(text(as_lost(status))), status_(as_lost(status)) {
  google::rpc::Status whole;
  if (!whole.ParseFromString(status_.error_details())) return;  // a proxy's status has only a code and a message
  google::rpc::ErrorInfo info;
  google::rpc::BadRequest bad;
  google::rpc::RetryInfo retry;
  for (const auto& detail : whole.details()) {
    if (detail.UnpackTo(&info)) {
      reason_ = info.reason();
    } else if (detail.UnpackTo(&bad)) {
      for (const auto& violation : bad.field_violations()) violations_[violation.field()] = violation.description();
    } else if (detail.UnpackTo(&retry)) {
      retry_after_ = std::chrono::seconds(retry.retry_delay().seconds()) +
                     std::chrono::nanoseconds(retry.retry_delay().nanos());
    }
  }
}

}  // namespace safelight
